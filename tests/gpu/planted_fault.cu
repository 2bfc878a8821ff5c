// What the sanitizer must see, or its silence about the kernels means nothing: `memcheck` writes one value beyond an array, `racecheck`
// reads shared memory that another warp wrote, without a barrier between.
#include <cstdio>
#include <cstring>

namespace {

__global__ void beyond(int* values, int count) {
  if (threadIdx.x <= count) values[threadIdx.x] = 1;
}

__global__ void no_barrier(int* values) {
  __shared__ int shared[64];
  shared[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = shared[63 - threadIdx.x];
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  int* values = nullptr;
  if (cudaMalloc(&values, 64 * sizeof(int)) != cudaSuccess) return 3;
  cudaMemset(values, 0, 64 * sizeof(int));
  if (std::strcmp(arguments[1], "memcheck") == 0) {
    beyond<<<1, 128>>>(values, 64);
  } else {
    no_barrier<<<1, 64>>>(values);
  }
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
