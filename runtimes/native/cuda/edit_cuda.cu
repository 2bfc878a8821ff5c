// The edit on an NVIDIA GPU. Not yet run on one: compiled for it, and run in an emulation of its threads (tests/native/cuda_emulation).
//
// A block of threads takes kRows neighbouring tokens. It leaves at once where none of them is edited in place, so that a few edited tokens
// cost a few tokens' work, and the host never reads a slot. Rows that share a slot go through A and U together: every 16 bytes of a bank
// that a thread loads (from L1 or L2, where the banks stay) serve kRows rows, whose loads are in flight at the same time.
// Sums are float32; each value is rounded once.
//
// A few tokens of a high rank would leave most of the device idle, each block reading a bank of its own for long. Where there is a workspace
// they are spread over their columns too: one kernel leaves a part of A h from every block there, a second adds the parts up and edits.

#include "cuda/edit_cuda.h"
#include "cuda/lanes.h"

namespace reft {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRanks = 4;
// Tokens are spread over their columns up to so many of them, from this rank on.
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
  float* parts;  // [tokens, chunks, rank] of the workspace: A h over the columns of a chunk
  int64_t chunks;
};

// R rows of one slot, all threads of the block together. sums [kWarps][R * kRanks] and z [rank][R] are shared memory, which may be
// used for other rows at once: a thread comes to write z only past a barrier that all have reached, with these rows behind them.
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
#pragma unroll 1
    for (int64_t d = first; d < a.width; d += stride) {
      Lanes<T, kLanes> x[R];
#pragma unroll
      for (int i = 0; i < R; ++i) x[i] = load<T, kLanes>(h + i * a.width + d);
#pragma unroll
      for (int k = 0; k < kRanks; ++k) {
        if (k >= ranks) break;
        const Lanes<T, kLanes> w = load_bank<T, kLanes>(A + k * a.width + d);
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
        float total = to_float(__ldg(a.b + static_cast<int64_t>(slot) * a.rank + k));
#pragma unroll 1
        for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * (R * kRanks) + threadIdx.x];
        z[k * R + threadIdx.x % R] = k < a.activated ? activate(total, a.activation) : total;
      }
    }
    __syncthreads();
  }

  const T* U = a.U + bank;
#pragma unroll 1
  for (int64_t d = first; d < a.width; d += stride) {
    float out[R][kLanes];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const Lanes<T, kLanes> x = load<T, kLanes>(h + i * a.width + d);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) out[i][lane] = to_float(x.value[lane]);
    }
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

// Blocks that an SM holds at once: so many registers for a thread that nothing spills, and enough rows in flight to fill the memory's pipes.
template <int kRows>
constexpr int kResident = kRows == 1 ? 4 : 3;

template <class T, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads, kResident<kRows>) edit_kernel(Arguments<T> a) {
  extern __shared__ float shared[];
  float* sums = shared;
  float* z = shared + kWarps * kRows * kRanks;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = a.tokens - token < kRows ? static_cast<int>(a.tokens - token) : kRows;
  const int32_t first = a.slot[token];
  bool together = rows == kRows;
  for (int i = 1; i < rows; ++i) together = together && a.slot[token + i] == first;
  if (together && in_bank(first, a.slots)) {
    edit_rows<T, kLanes, kRows>(a, token, first, sums, z);
    return;
  }
  const bool in_place = a.h == a.y;
  for (int i = 0; i < rows; ++i) {
    // Every thread of the block sees the same slots, so all of them come to the barriers inside or none does.
    const int32_t slot = a.slot[token + i];
    if (in_bank(slot, a.slots)) {
      edit_rows<T, kLanes, 1>(a, token + i, slot, sums, z);
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

// The columns of a chunk: 16 bytes for each lane of a warp.
template <class T>
constexpr int64_t kChunk = 32 * 16 / sizeof(T);

// parts[token][chunk][k] = A[k] h over the columns of the chunk. A warp takes kRanks ranks at once.
template <class T>
__global__ void __launch_bounds__(kThreads) project_kernel(Arguments<T> a) {
  constexpr int kLanes = 16 / sizeof(T);
  const int64_t token = blockIdx.x, chunk = blockIdx.y;
  const int32_t slot = a.slot[token];
  if (!in_bank(slot, a.slots)) return;
  const int lane_of_warp = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t d = chunk * kChunk<T> + lane_of_warp * kLanes;
  const bool inside = d < a.width;
  const T* A = a.A + static_cast<int64_t>(slot) * a.rank * a.width + d;
  Lanes<T, kLanes> x{};
  if (inside) x = load<T, kLanes>(a.h + token * a.width + d);
  for (int k0 = warp * kRanks; k0 < a.rank; k0 += kWarps * kRanks) {
    float sum[kRanks] = {};
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
      if (!inside || k0 + k >= a.rank) break;
      const Lanes<T, kLanes> w = load_bank<T, kLanes>(A + (k0 + k) * a.width);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) sum[k] = fmaf(to_float(w.value[lane]), to_float(x.value[lane]), sum[k]);
    }
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum[k] += __shfl_down_sync(0xffffffffu, sum[k], offset);
      if (lane_of_warp == 0 && k0 + k < a.rank) a.parts[(token * a.chunks + chunk) * a.rank + k0 + k] = sum[k];
    }
  }
}

// y of one chunk of a token. The warps share the ranks, and add up what they have in shared memory: z [rank], then [kWarps][kChunk].
template <class T>
__global__ void __launch_bounds__(kThreads) add_kernel(Arguments<T> a) {
  constexpr int kLanes = 16 / sizeof(T);
  extern __shared__ float shared[];
  float* z = shared;
  float* sums = shared + a.rank;
  const int64_t token = blockIdx.x, chunk = blockIdx.y;
  const int32_t slot = a.slot[token];
  const int lane_of_warp = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t d = chunk * kChunk<T> + lane_of_warp * kLanes;
  const bool inside = d < a.width;
  const T* h = a.h + token * a.width + d;
  T* y = a.y + token * a.width + d;
  if (!in_bank(slot, a.slots)) {
    if (warp == 0 && inside && a.h != a.y) store<T, kLanes>(y, load<T, kLanes>(h));
    return;
  }

  for (int k = static_cast<int>(threadIdx.x); k < a.rank; k += kThreads) {
    float total = to_float(__ldg(a.b + static_cast<int64_t>(slot) * a.rank + k));
#pragma unroll 4
    for (int64_t c = 0; c < a.chunks; ++c) total += a.parts[(token * a.chunks + c) * a.rank + k];
    z[k] = k < a.activated ? activate(total, a.activation) : total;
  }
  __syncthreads();

  const T* U = a.U + static_cast<int64_t>(slot) * a.rank * a.width + d;
  float out[kLanes] = {};
  if (inside) {
#pragma unroll 4
    for (int k = warp; k < a.rank; k += kWarps) {
      const Lanes<T, kLanes> u = load_bank<T, kLanes>(U + k * a.width);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) out[lane] = fmaf(to_float(u.value[lane]), z[k], out[lane]);
    }
  }
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) sums[(warp * kLanes + lane) * 32 + lane_of_warp] = out[lane];
  __syncthreads();

  if (warp != 0 || !inside) return;
  Lanes<T, kLanes> x = load<T, kLanes>(h);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    float total = to_float(x.value[lane]);
    for (int w = 0; w < kWarps; ++w) total += sums[(w * kLanes + lane) * 32 + lane_of_warp];
    from_float(total, &x.value[lane]);
  }
  store<T, kLanes>(y, x);
}

bool is_spread(int64_t tokens, int64_t rank) { return tokens <= kFewTokens && rank >= kHighRank; }

template <class T>
int64_t chunks_of(int64_t width) {
  return (width + kChunk<T> - 1) / kChunk<T>;
}

template <class T>
cudaError_t launch_spread(Arguments<T> arguments, cudaStream_t stream) {
  if (arguments.chunks > 0xffff) return cudaErrorInvalidConfiguration;
  void* parameters[] = {&arguments};
  const dim3 grid(static_cast<unsigned>(arguments.tokens), static_cast<unsigned>(arguments.chunks));
  const void* project = reinterpret_cast<const void*>(&project_kernel<T>);
  if (const cudaError_t error = cudaLaunchKernel(project, grid, dim3(kThreads), parameters, 0, stream)) return error;
  const size_t shared_bytes = sizeof(float) * static_cast<size_t>(arguments.rank + kWarps * kChunk<T>);
  return cudaLaunchKernel(reinterpret_cast<const void*>(&add_kernel<T>), grid, dim3(kThreads), parameters, shared_bytes, stream);
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
                 static_cast<float*>(workspace),
                 chunks_of<T>(edit.width)};
  constexpr int kLanes = 16 / sizeof(T);
  const bool vectors = edit.width % kLanes == 0 && aligned(edit.h) && aligned(edit.y) && aligned(edit.U) && aligned(edit.A);
  if (!vectors) return launch_rows<T, 1, 1>(a, stream);
  if (workspace != nullptr && is_spread(edit.tokens, edit.rank)) return launch_spread<T>(a, stream);
  return edit.tokens < kManyTokens ? launch_rows<T, kLanes, 1>(a, stream) : launch_rows<T, kLanes, 4>(a, stream);
}

}  // namespace

int64_t workspace_bytes(DType dtype, int64_t tokens, int64_t rank, int64_t width) {
  const int64_t few = tokens < kFewTokens ? tokens : kFewTokens;
  if (few <= 0 || !is_spread(few, rank)) return 0;
  const int64_t chunks = dtype == DType::kFloat32 ? chunks_of<float>(width) : chunks_of<__half>(width);
  return few * chunks * rank * static_cast<int64_t>(sizeof(float));
}

const char* launch_edit(const Edit& edit, void* stream, void* workspace) {
  if (edit.tokens == 0 || edit.width == 0) return nullptr;
  return launch_by_type(edit.dtype, [&](auto value) { return launch<decltype(value)>(edit, workspace, static_cast<cudaStream_t>(stream)); });
}

}  // namespace reft
