// What a launch alone costs: a kernel that does nothing, for the benchmark.
#include <cstdint>

namespace {
__global__ void empty() {}
}  // namespace

// Queues it on stream, and returns cudaError_t's number.
extern "C" int launch_empty(int64_t blocks, int threads, void* stream) {
  empty<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>();
  return cudaGetLastError();
}
