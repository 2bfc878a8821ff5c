// The GPU's place taken by the host, for a test of cases_on_gpu.cc where there is none: CUDA's memory is malloc's, under AddressSanitizer,
// and the kernels are the CPU's.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "c_api/reft.h"
#include "cpu/edit_cpu.h"

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "none"; }
const char* cudaGetErrorString(cudaError_t) { return "none"; }

int64_t reft_edit_cuda_workspace(int64_t tokens, int64_t rank) {
  return tokens * rank * static_cast<int64_t>(sizeof(float));
}

const char* reft_edit_cuda(int dtype, const void* h, void* y, const int32_t* slot, const void* U, const void* A, const void* b,
                           int64_t tokens, int64_t slots, int64_t rank, int64_t width, const char* activation, const char* activated,
                           void* workspace, void*) {
  reft::Edit edit{static_cast<reft::DType>(dtype), {}, {}, h, y, slot, U, A, b, tokens, slots, rank, width};
  if (!reft::parse_activation(activation, &edit.activation) || !reft::parse_activated(activated, &edit.first_half)) return "a wrong name";
  if (workspace != nullptr) std::memset(workspace, 0, reft_edit_cuda_workspace(tokens, rank));
  edit_tokens(edit, 0, tokens, **reft::usable_row_kernels());
  return nullptr;
}

const char* reft_red_cuda(int dtype, const void* h, void* y, const int32_t* slot, const void* scale, const void* bias, int64_t tokens,
                          int64_t slots, int64_t width, void*) {
  const reft::RedEdit edit{static_cast<reft::DType>(dtype), h, y, slot, scale, bias, tokens, slots, width};
  edit_tokens(edit, 0, tokens, **reft::usable_row_kernels());
  return nullptr;
}
