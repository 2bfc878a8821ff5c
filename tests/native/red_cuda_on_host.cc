// RED's CUDA kernel compiled for the host and called once per thread of its grid: it has no barrier and no shared memory, so that one thread
// after the other computes what a GPU does, but for the GPU's own rounding, memory order and alignment faults. A pointer that is not
// aligned as its access needs is caught by UndefinedBehaviorSanitizer, with which this is compiled.
#include <cuda_runtime.h>

#include <cstdint>

#include "c_api/reft.h"

static uint3 blockIdx, threadIdx;

namespace {

// reft::Arguments<T> of any T: eight words, passed by value.
struct Words {
  int64_t word[8];
};

cudaError_t launch_on_host(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t, cudaStream_t) {
  const Words arguments = *static_cast<const Words*>(parameters[0]);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) reinterpret_cast<void (*)(Words)>(const_cast<void*>(kernel))(arguments);
    }
  }
  return cudaSuccess;
}

}  // namespace

#define __launch_bounds__(threads)
#define cudaLaunchKernel launch_on_host
#define cudaGetErrorName(error) "cudaError"
#define cudaGetErrorString(error) "on the host"
#include "cuda/red_cuda.cu"

// As reft_red_cuda, on host memory.
REFT_EXPORT const char* red_cuda_on_host(int dtype, const void* h, void* y, const int32_t* slot, const void* scale, const void* bias,
                                         int64_t tokens, int64_t slots, int64_t width) {
  static_assert(sizeof(reft::Arguments<float>) == sizeof(Words), "the kernel's arguments are not eight words");
  return reft::launch_edit(reft::RedEdit{static_cast<reft::DType>(dtype), h, y, slot, scale, bias, tokens, slots, width}, nullptr);
}
