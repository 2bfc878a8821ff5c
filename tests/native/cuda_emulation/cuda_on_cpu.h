// CUDA's blocks and threads on one thread of the host, so that unmodified kernels run, under sanitizers, where no GPU is.
//
// Blocks run one after the other; every thread of a block is a fiber, which runs until its next barrier or shuffle, or to its end. Then:
//   __syncthreads       every thread of the block comes to it, from one line, the same number of times, and none has ended
//   __shfl_down_sync    every lane of the warp comes to it, from one line, with a full mask
//   shared memory       dynamic only (Arena); NaN before every block, and what was not asked for is poisoned under AddressSanitizer
// Anything else ends the process with a line. Threads run in rising or in falling order: a value that is read without a barrier is still
// NaN, or already overwritten, in one of the two. What this cannot show is the GPU's own rounding, memory order and speed.
//
// A kernel's file is included after this header, with REFT_EMULATED_SHARED before it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace emulation {

extern uint3 thread_index, block_index;
extern bool falling;  // threads and warps run from the last to the first

constexpr size_t kSharedBytes = 48 << 10;  // what a block gets without asking for more

// The dynamic shared memory of one kernel's file.
struct Arena {
  float* values;  // kSharedBytes of them
};

// Runs body(argument) once per thread of the grid; an error where CUDA refuses the launch.
cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, Arena arena, void (*body)(const void*), const void* argument);

void barrier(int line);
float shuffle_down(unsigned mask, float value, int offset, int line);

// The first parameter of a kernel by value, whatever its type: a structure of the same size travels in the same way.
template <size_t kBytes>
struct Parameter {
  int64_t word[kBytes / 8];
};

template <size_t kBytes>
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared_bytes, Arena arena) {
  struct Call {
    const void* kernel;
    Parameter<kBytes> parameter;
  };
  const Call call{kernel, *static_cast<const Parameter<kBytes>*>(parameters[0])};
  const auto body = [](const void* argument) {
    const Call& called = *static_cast<const Call*>(argument);
    reinterpret_cast<void (*)(Parameter<kBytes>)>(const_cast<void*>(called.kernel))(called.parameter);
  };
  return run_grid(grid, block, shared_bytes, arena, body, &call);
}

}  // namespace emulation

// Kernels name their shared memory `shared`, and live in namespace reft.
#define REFT_EMULATED_SHARED                                              \
  namespace reft {                                                        \
  namespace {                                                             \
  alignas(16) float shared[emulation::kSharedBytes / sizeof(float)];      \
  }                                                                       \
  }

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define __launch_bounds__(...)
#undef __shared__
#define __shared__
#define __syncthreads() emulation::barrier(__LINE__)
#define __shfl_down_sync(mask, value, offset) emulation::shuffle_down(mask, value, offset, __LINE__)
#define __ldg(pointer) (*(pointer))
#define __stcg(pointer, value) (*(pointer) = (value))
#define cudaGetErrorName(error) "cudaErrorInvalidConfiguration"
#define cudaGetErrorString(error) "emulated"
#define cudaLaunchKernel launch_emulated
