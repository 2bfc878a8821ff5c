// The edit on an NVIDIA GPU. Not yet run on one: compiled for it, and run in an emulation of its threads (tests/native/cuda_emulation).
//
// A block of threads takes kRows neighbouring tokens. It leaves at once where none of them is edited in place, so that a few edited tokens
// cost a few tokens' work, and the host never reads a slot. Rows that share a slot go through A and U together: every 16 bytes of a bank
// that a thread loads (from L1 or L2, where the banks stay) serve kRows rows, whose loads are in flight at the same time.
// Sums are float32; each value is rounded once.
//
// A few tokens of a high rank would leave most of the device idle, each block reading its banks for long. Where there is a workspace they are
// spread: one kernel, over tokens and ranks, leaves z = act(A h + b) there, and a second, over tokens and columns, adds U^T z.

#include "cuda/edit_cuda.h"
#include "cuda/lanes.h"

namespace reft {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRanks = 4;
// Up to so many tokens are spread, from this rank on. An estimate (docs/benchmarks.md, GPU): a block alone is bound by its SM's rate, many
// of them by L2's, spread or not; and below this rank a second launch costs what it saves.
constexpr int64_t kFewTokens = 32;
constexpr int64_t kHighRank = 32;

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
  float* z;  // [tokens, rank]: the workspace of a spread edit
};

// z[k * R + i] = act(A[k] h[i] + b[k]) of R rows of one slot, for kRanks ranks from k0 on; all threads of the block together.
// sums [kWarps][R * kRanks] is shared memory; z is valid past the next barrier. kTogether: of how many ranks a thread loads A before it uses
// the first, since a load among the sums waits for those before it.
template <class T, int kLanes, int R, int kTogether>
__device__ void project(const Arguments<T>& a, const T* h, int32_t slot, int k0, float* sums, float* z) {
  const int64_t stride = static_cast<int64_t>(kThreads) * kLanes;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kLanes;
  const int ranks = a.rank - k0 < kRanks ? a.rank - k0 : kRanks;
  const T* A = a.A + (static_cast<int64_t>(slot) * a.rank + k0) * a.width;
  float sum[R][kRanks] = {};
#pragma unroll 1
  for (int64_t d = first; d < a.width; d += stride) {
    Lanes<T, kLanes> x[R];
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = load<T, kLanes>(h + i * a.width + d);
#pragma unroll
    for (int first_k = 0; first_k < kRanks; first_k += kTogether) {
      if (first_k >= ranks) break;
      Lanes<T, kLanes> w[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first_k + i < ranks) w[i] = load_bank<T, kLanes>(A + (first_k + i) * a.width + d);
      }
#pragma unroll
      for (int k = first_k; k < first_k + kTogether; ++k) {
        if (k >= ranks) break;
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          const float factor = to_float(w[k - first_k].value[lane]);
#pragma unroll
          for (int i = 0; i < R; ++i) sum[i][k] = fmaf(factor, to_float(x[i].value[lane]), sum[i][k]);
        }
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
      float total = to_float(__ldg(a.b + static_cast<int64_t>(slot) * a.rank + k));
#pragma unroll 1
      for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * (R * kRanks) + threadIdx.x];
      z[k * R + threadIdx.x % R] = k < a.activated ? activate(total, a.activation) : total;
    }
  }
}

// R rows of one slot, all threads of the block together. sums [kWarps][R * kRanks] and z [rank][R] are shared memory, which may be
// used for other rows at once: a thread comes to write z only past a barrier that all have reached, with these rows behind them.
template <class T, int kLanes, int R, int kTogether>
__device__ void edit_rows(const Arguments<T>& a, int64_t token, int32_t slot, float* sums, float* z) {
  const T* h = a.h + token * a.width;
  T* y = a.y + token * a.width;
  for (int k0 = 0; k0 < a.rank; k0 += kRanks) {
    project<T, kLanes, R, kTogether>(a, h, slot, k0, sums, z);
    __syncthreads();
  }

  const T* U = a.U + static_cast<int64_t>(slot) * a.rank * a.width;
  const int64_t stride = static_cast<int64_t>(kThreads) * kLanes;
#pragma unroll 1
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * kLanes; d < a.width; d += stride) {
    float out[R][kLanes];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const Lanes<T, kLanes> x = load<T, kLanes>(h + i * a.width + d);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) out[i][lane] = to_float(x.value[lane]);
    }
#pragma unroll kTogether
    for (int k = 0; k < a.rank; ++k) {
      const Lanes<T, kLanes> u = load_bank<T, kLanes>(U + k * a.width + d);
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
}

template <class T, int kLanes>
__device__ void copy_row(const Arguments<T>& a, int64_t token) {
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * kLanes; d < a.width; d += static_cast<int64_t>(kThreads) * kLanes) {
    store<T, kLanes>(a.y + token * a.width + d, load<T, kLanes>(a.h + token * a.width + d));
  }
}

// Blocks that an SM holds at once: so many registers for a thread that nothing spills, and enough loads in flight to fill the memory's pipes.
template <int kRows>
constexpr int kResident = kRows == 1 ? 2 : 3;

template <class T, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads, kResident<kRows>) edit_kernel(Arguments<T> a) {
  // Four rows keep loads enough in flight, and leave no registers for more.
  constexpr int kTogether = kRows == 1 ? kRanks : 1;
  extern __shared__ float shared[];
  float* sums = shared;
  float* z = shared + kWarps * kRows * kRanks;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = a.tokens - token < kRows ? static_cast<int>(a.tokens - token) : kRows;
  const int32_t first = a.slot[token];
  bool together = rows == kRows;
  for (int i = 1; i < rows; ++i) together = together && a.slot[token + i] == first;
  if (together && in_bank(first, a.slots)) {
    edit_rows<T, kLanes, kRows, kTogether>(a, token, first, sums, z);
    return;
  }
  const bool in_place = a.h == a.y;
  for (int i = 0; i < rows; ++i) {
    // Every thread of the block sees the same slots, so all of them come to the barriers inside or none does.
    const int32_t slot = a.slot[token + i];
    if (in_bank(slot, a.slots)) {
      edit_rows<T, kLanes, 1, kTogether>(a, token + i, slot, sums, z);
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

// z of kRanks ranks of a token, in the same order of sums as edit_rows.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) project_kernel(Arguments<T> a) {
  extern __shared__ float shared[];
  const int64_t token = blockIdx.y;
  const int32_t slot = a.slot[token];
  if (!in_bank(slot, a.slots)) return;
  project<T, kLanes, 1, kRanks>(a, a.h + token * a.width, slot, static_cast<int>(blockIdx.x) * kRanks, shared, a.z + token * a.rank);
}

// y of 32 * kLanes columns of a token, of which no other block reads or writes any. The warps share the ranks, and add up what they have in
// shared memory, [kWarps][kLanes][32].
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) add_kernel(Arguments<T> a) {
  extern __shared__ float shared[];
  const int64_t token = blockIdx.y;
  const int32_t slot = a.slot[token];
  const int lane_of_warp = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t d = (static_cast<int64_t>(blockIdx.x) * 32 + lane_of_warp) * kLanes;
  const bool inside = d < a.width;
  const T* h = a.h + token * a.width + d;
  T* y = a.y + token * a.width + d;
  if (!in_bank(slot, a.slots)) {
    if (warp == 0 && inside && a.h != a.y) store<T, kLanes>(y, load<T, kLanes>(h));
    return;
  }

  const T* U = a.U + static_cast<int64_t>(slot) * a.rank * a.width + d;
  const float* z = a.z + token * a.rank;
  float out[kLanes] = {};
#pragma unroll 1
  for (int k0 = warp; inside && k0 < a.rank; k0 += kRanks * kWarps) {
    Lanes<T, kLanes> u[kRanks];
    float factor[kRanks];
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const int k = k0 + i * kWarps;
      if (k >= a.rank) continue;
      u[i] = load_bank<T, kLanes>(U + k * a.width);
      factor[i] = z[k];
    }
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      if (k0 + i * kWarps >= a.rank) break;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) out[lane] = fmaf(to_float(u[i].value[lane]), factor[i], out[lane]);
    }
  }
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) shared[(warp * kLanes + lane) * 32 + lane_of_warp] = out[lane];
  __syncthreads();

  if (warp != 0 || !inside) return;
  Lanes<T, kLanes> x = load<T, kLanes>(h);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    float total = to_float(x.value[lane]);
    for (int w = 0; w < kWarps; ++w) total += shared[(w * kLanes + lane) * 32 + lane_of_warp];
    from_float(total, &x.value[lane]);
  }
  store<T, kLanes>(y, x);
}

bool is_spread(int64_t tokens, int64_t rank) { return tokens <= kFewTokens && rank >= kHighRank; }

// Two kernels of one stream: the second starts when all of z is there.
template <class T, int kLanes>
cudaError_t launch_spread(Arguments<T> arguments, cudaStream_t stream) {
  void* parameters[] = {&arguments};
  const auto queue = [&](void (*kernel)(Arguments<T>), int64_t across, size_t shared_values) {
    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(arguments.tokens));
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads), parameters, sizeof(float) * shared_values, stream);
  };
  const int64_t columns = 32 * kLanes;
  if (const cudaError_t error = queue(&project_kernel<T, kLanes>, (arguments.rank + kRanks - 1) / kRanks, kWarps * kRanks)) return error;
  return queue(&add_kernel<T, kLanes>, (arguments.width + columns - 1) / columns, kWarps * columns);
}

template <class T>
cudaError_t launch(const Edit& edit, void* workspace, cudaStream_t stream) {
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
                 edit.width,
                 static_cast<float*>(workspace)};
  constexpr int kLanes = 16 / sizeof(T);
  const bool vectors = edit.width % kLanes == 0 && aligned(edit.h) && aligned(edit.y) && aligned(edit.U) && aligned(edit.A);
  if (workspace != nullptr && is_spread(edit.tokens, edit.rank)) {
    return vectors ? launch_spread<T, kLanes>(a, stream) : launch_spread<T, 1>(a, stream);
  }
  if (!vectors) return launch_rows<T, 1, 1>(a, stream);
  return edit.tokens < kManyTokens ? launch_rows<T, kLanes, 1>(a, stream) : launch_rows<T, kLanes, 4>(a, stream);
}

}  // namespace

int64_t workspace_bytes(int64_t tokens, int64_t rank) {
  return is_spread(tokens, rank) ? tokens * rank * static_cast<int64_t>(sizeof(float)) : 0;
}

int64_t most_workspace_bytes(int64_t tokens, int64_t rank) { return workspace_bytes(tokens < kFewTokens ? tokens : kFewTokens, rank); }

const char* launch_edit(const Edit& edit, void* stream, void* workspace) {
  if (edit.tokens == 0 || edit.width == 0) return nullptr;
  return launch_by_type(edit.dtype, [&](auto value) { return launch<decltype(value)>(edit, workspace, static_cast<cudaStream_t>(stream)); });
}

}  // namespace reft
