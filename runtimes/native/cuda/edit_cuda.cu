// The edit on an NVIDIA GPU. Not yet run on one: compiled for it, and run in an emulation of its threads (tests/native/cuda_emulation).
//
// A block of threads takes kRows neighbouring tokens. It leaves at once where none of them is edited in place, so that a few edited tokens
// cost a few tokens' work, and the host never reads a slot. Rows that share a slot go through A and U together: every 16 bytes of a bank
// that a thread loads (from L1 or L2, where the banks stay) serve kRows rows, whose loads are in flight at the same time.
// Sums are float32; each value is rounded once.

#include "cuda/edit_cuda.h"
#include "cuda/lanes.h"

namespace reft {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRanks = 4;

template <class T>
struct Arguments {
  const T* h;
  T* y;
  const int32_t* slot;
  const T* U;
  const T* A;
  const T* b;
  int64_t tokens;
  int64_t slots;
  int rank;
  int activated;
  Activation activation;
  int64_t width;
};

// R rows of one slot, all threads of the block together. sums [kWarps][R * kRanks] and z [rank][R] are shared memory.
template <class T, int kLanes, int R>
__device__ void edit_rows(const Arguments<T>& a, int64_t token, int32_t slot, float* sums, float* z) {
  const int64_t bank = static_cast<int64_t>(slot) * a.rank * a.width;
  const T* h = a.h + token * a.width;
  T* y = a.y + token * a.width;
  const int64_t stride = static_cast<int64_t>(kThreads) * kLanes;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kLanes;

  for (int k0 = 0; k0 < a.rank; k0 += kRanks) {
    const int ranks = a.rank - k0 < kRanks ? a.rank - k0 : kRanks;
    const T* A = a.A + bank + k0 * a.width;
    float sum[R][kRanks] = {};
    for (int64_t d = first; d < a.width; d += stride) {
      Lanes<T, kLanes> x[R];
#pragma unroll
      for (int i = 0; i < R; ++i) x[i] = load<T, kLanes>(h + i * a.width + d);
#pragma unroll
      for (int k = 0; k < kRanks; ++k) {
        if (k >= ranks) break;
        const Lanes<T, kLanes> w = load<T, kLanes>(A + k * a.width + d);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          const float factor = to_float(w.value[lane]);
#pragma unroll
          for (int i = 0; i < R; ++i) sum[i][k] = fmaf(factor, to_float(x[i].value[lane]), sum[i][k]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int k = 0; k < kRanks; ++k) {
        float total = sum[i][k];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
        if (threadIdx.x % 32 == 0) sums[(threadIdx.x / 32) * (R * kRanks) + k * R + i] = total;
      }
    }
    __syncthreads();
    if (threadIdx.x < R * kRanks) {
      const int k = k0 + threadIdx.x / R;
      if (k < a.rank) {
        float total = to_float(a.b[static_cast<int64_t>(slot) * a.rank + k]);
        for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * (R * kRanks) + threadIdx.x];
        z[k * R + threadIdx.x % R] = k < a.activated ? activate(total, a.activation) : total;
      }
    }
    __syncthreads();
  }

  const T* U = a.U + bank;
  for (int64_t d = first; d < a.width; d += stride) {
    float out[R][kLanes];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const Lanes<T, kLanes> x = load<T, kLanes>(h + i * a.width + d);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) out[i][lane] = to_float(x.value[lane]);
    }
    for (int k = 0; k < a.rank; ++k) {
      const Lanes<T, kLanes> u = load<T, kLanes>(U + k * a.width + d);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const float factor = to_float(u.value[lane]);
#pragma unroll
        for (int i = 0; i < R; ++i) out[i][lane] = fmaf(factor, z[k * R + i], out[i][lane]);
      }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      Lanes<T, kLanes> rounded;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) from_float(out[i][lane], &rounded.value[lane]);
      store<T, kLanes>(y + i * a.width + d, rounded);
    }
  }
  __syncthreads();  // z is free for the next rows
}

template <class T, int kLanes>
__device__ void copy_row(const Arguments<T>& a, int64_t token) {
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * kLanes; d < a.width; d += static_cast<int64_t>(kThreads) * kLanes) {
    store<T, kLanes>(a.y + token * a.width + d, load<T, kLanes>(a.h + token * a.width + d));
  }
}

template <class T, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads) edit_kernel(Arguments<T> a) {
  extern __shared__ float shared[];
  float* sums = shared;
  float* z = shared + kWarps * kRows * kRanks;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = a.tokens - token < kRows ? static_cast<int>(a.tokens - token) : kRows;
  int32_t slot[kRows];
  bool together = rows == kRows;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    slot[i] = i < rows ? a.slot[token + i] : -1;
    together = together && slot[i] == slot[0];
  }
  const bool in_place = a.h == a.y;
  if (together && in_bank(slot[0], a.slots)) {
    edit_rows<T, kLanes, kRows>(a, token, slot[0], sums, z);
    return;
  }
  for (int i = 0; i < rows; ++i) {
    // Every thread of the block sees the same slots, so all of them come to the barriers inside or none does.
    if (in_bank(slot[i], a.slots)) {
      edit_rows<T, kLanes, 1>(a, token + i, slot[i], sums, z);
    } else if (!in_place) {
      copy_row<T, kLanes>(a, token + i);
    }
  }
}

template <class T, int kLanes, int kRows>
cudaError_t launch_rows(Arguments<T> arguments, cudaStream_t stream) {
  const int64_t blocks = (arguments.tokens + kRows - 1) / kRows;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* parameters[] = {&arguments};
  const size_t shared_bytes = sizeof(float) * kRows * static_cast<size_t>(kWarps * kRanks + arguments.rank);
  const dim3 grid(static_cast<unsigned>(blocks));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&edit_kernel<T, kLanes, kRows>), grid, dim3(kThreads), parameters, shared_bytes, stream);
}

template <class T>
cudaError_t launch(const Edit& edit, cudaStream_t stream) {
  Arguments<T> a{static_cast<const T*>(edit.h),
                 static_cast<T*>(edit.y),
                 edit.slot,
                 static_cast<const T*>(edit.U),
                 static_cast<const T*>(edit.A),
                 static_cast<const T*>(edit.b),
                 edit.tokens,
                 edit.slots,
                 static_cast<int>(edit.rank),
                 static_cast<int>(activated_rows(edit)),
                 edit.activation,
                 edit.width};
  constexpr int kLanes = 16 / sizeof(T);
  const bool vectors = edit.width % kLanes == 0 && aligned(edit.h) && aligned(edit.y) && aligned(edit.U) && aligned(edit.A);
  if (!vectors) return launch_rows<T, 1, 1>(a, stream);
  return edit.tokens < kManyTokens ? launch_rows<T, kLanes, 1>(a, stream) : launch_rows<T, kLanes, 4>(a, stream);
}

}  // namespace

const char* launch_edit(const Edit& edit, void* stream) {
  if (edit.tokens == 0 || edit.width == 0) return nullptr;
  return launch_by_type(edit.dtype, [&](auto value) { return launch<decltype(value)>(edit, static_cast<cudaStream_t>(stream)); });
}

}  // namespace reft
