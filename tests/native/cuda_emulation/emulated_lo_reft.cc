#include "cuda_on_cpu.h"

REFT_EMULATED_SHARED
static cudaError_t launch_emulated(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared_bytes, cudaStream_t);
#include "cuda/edit_cuda.cu"

static cudaError_t launch_emulated(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared_bytes, cudaStream_t) {
  return emulation::launch<sizeof(reft::Arguments<float>)>(kernel, grid, block, parameters, shared_bytes, {reft::shared});
}
