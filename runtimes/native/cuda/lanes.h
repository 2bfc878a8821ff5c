// Values in device memory: several at once, and to and from float32. For the kernels alone: only nvcc reads it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "reft/edit.h"

namespace reft {
namespace {

// Below this many tokens one row per block fills more of the device than four would.
constexpr int64_t kManyTokens = 1024;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// kLanes neighbouring values, loaded and stored at once: 16 bytes, or one value where the rows are not 16-byte aligned.
template <class T, int kLanes>
struct alignas(kLanes * sizeof(T)) Lanes {
  T value[kLanes];
};

template <class T, int kLanes>
__device__ inline Lanes<T, kLanes> load(const T* p) {
  return *reinterpret_cast<const Lanes<T, kLanes>*>(p);
}

// Of memory that no kernel in flight writes: through the read-only path.
template <class T, int kLanes>
__device__ inline Lanes<T, kLanes> load_bank(const T* p) {
  Lanes<T, kLanes> lanes;
  if constexpr (sizeof lanes == sizeof(uint4)) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    std::memcpy(&lanes, &bits, sizeof bits);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) lanes.value[lane] = __ldg(p + lane);
  }
  return lanes;
}

// Through a uint4: nvcc splits the store of a structure of 2-byte values into as many stores. Written in L2 only: nothing here reads y again.
template <class T, int kLanes>
__device__ inline void store(T* p, const Lanes<T, kLanes>& lanes) {
  if constexpr (sizeof lanes == sizeof(uint4)) {
    uint4 bits;
    std::memcpy(&bits, &lanes, sizeof bits);
    __stcg(reinterpret_cast<uint4*>(p), bits);
  } else {
    *reinterpret_cast<Lanes<T, kLanes>*>(p) = lanes;
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// launch is called with a value of the edit's type; null, or the name and text of its error.
template <class Launch>
const char* launch_by_type(DType dtype, Launch launch) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32:
      error = launch(float{});
      break;
    case DType::kFloat16:
      error = launch(__half{});
      break;
    case DType::kBFloat16:
      error = launch(__nv_bfloat16{});
      break;
  }
  if (error == cudaSuccess) return nullptr;
  static thread_local char text[192];
  std::snprintf(text, sizeof text, "%s (%s)", cudaGetErrorName(error), cudaGetErrorString(error));
  return text;
}

}  // namespace
}  // namespace reft
