// The edits of ONNX Runtime's CUDA provider, queued on its stream; scratch comes from its arena.

#include "cuda/edit_cuda.h"
#include "ort/op.h"

namespace reft::ort {
namespace {

Status queued(const Kernel& kernel, const char* error) {
  return error == nullptr ? nullptr : refused(kernel.api, "%s: CUDA launch failed: %s", kernel.op, error);
}

}  // namespace

Status queue_edit(const Kernel& kernel, const Context* context, const Edit& edit) {
  void* stream = nullptr;
  if (Status status = GetComputeStream::call(kernel.api, context, &stream)) return status;
  // Scratch belongs to a stream: asked for some where the provider has none, onnxruntime 1.18 reads through a null pointer.
  const int64_t bytes = stream != nullptr ? workspace_bytes(edit.tokens, edit.rank) : 0;
  void* workspace = nullptr;
  if (bytes > 0) {
    const MemoryInfo* where = kernel.memory->Info(kernel.memory);
    if (Status status = GetScratchBuffer::call(kernel.api, context, where, static_cast<size_t>(bytes), &workspace)) return status;
  }
  const char* error = launch_edit(edit, stream, workspace);
  // Before the kernels have run, as onnxruntime's own operators do: the arena hands a stream's memory out again behind what is queued there.
  if (workspace != nullptr) kernel.memory->Free(kernel.memory, workspace);
  return queued(kernel, error);
}

Status queue_edit(const Kernel& kernel, const Context* context, const RedEdit& edit) {
  void* stream = nullptr;
  if (Status status = GetComputeStream::call(kernel.api, context, &stream)) return status;
  return queued(kernel, launch_edit(edit, stream));
}

}  // namespace reft::ort
