// The CUDA launcher's place taken by the CPU kernels: the plugin's enqueue runs on host memory, and what it forwards can be computed with.
// A stream of 1 is a launch that fails. The workspace's sizes are made of what is asked for.
#include <cstdint>

#include "cpu/edit_cpu.h"
#include "cuda/edit_cuda.h"

namespace {

template <class AnyEdit>
const char* launch(const AnyEdit& edit, void* stream) {
  if (reinterpret_cast<uintptr_t>(stream) == 1) return "cudaErrorOnPurpose (a launch that fails)";
  edit_tokens(edit, 0, edit.tokens, **reft::usable_row_kernels());
  return nullptr;
}

}  // namespace

int64_t reft::most_workspace_bytes(int64_t tokens, int64_t rank) { return tokens * 1000 + rank; }

const char* reft::launch_edit(const Edit& edit, void* stream, void* workspace) {
  return workspace == nullptr ? "the workspace did not arrive" : launch(edit, stream);
}
const char* reft::launch_edit(const RedEdit& edit, void* stream) { return launch(edit, stream); }
