// A block of rows that share one slot, for one instruction set:
//
//     project:  z = A h + b0      A [rank, width], h rows of [width]  ->  z [rank, kRows]  (b and the activation come after it)
//     expand:   y = h + U^T z     U [rank, width]
//     scale:    y = s * h + b     s, b [width]         (RED)
//
// Included by one source file per instruction set, which gives the vector type V, and where it pays another one for bfloat16. V::Register
// holds kLanes values of a row, V::Sum what a dot product adds up in: the same type, or half of one where kLanes values take two vectors. The rows of a block go through A and U together, so
// that a bank is read once per block and every loaded vector of it serves kRows multiply-adds.
//
// Everything here has internal linkage: a file compiled for AVX-512 must never lend an inline function to the rest of the library.
#pragma once

#include <cstdint>

#include "cpu/half.h"
#include "cpu/row_kernels.h"

namespace reft {
namespace {

// sum[i][k][c] += A[k] . h[i] over the columns [begin, end), R rows and K ranks. C independent sums per (row, rank), where R * K of them
// alone would wait for each other.
template <class V, class T, int R, int K, int C>
inline void accumulate(const T* const* h, const T* A, int64_t width, int64_t begin, int64_t end, typename V::Sum (&total)[R][K][C]) {
  // A copy, so that the sums live in registers: total is memory.
  typename V::Sum sum[R][K][C];
  for (int i = 0; i < R; ++i)
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < C; ++c) sum[i][k][c] = total[i][k][c];
  int64_t d = begin;
  for (; d + C * V::kLanes <= end; d += C * V::kLanes) {
    for (int c = 0; c < C; ++c) {
      const int64_t column = d + c * V::kLanes;
      typename V::Register a[K];
      for (int k = 0; k < K; ++k) a[k] = V::load(A + k * width + column);
      for (int i = 0; i < R; ++i) {
        const typename V::Register x = V::load(h[i] + column);
        for (int k = 0; k < K; ++k) sum[i][k][c] = V::multiply_add(a[k], x, sum[i][k][c]);
      }
    }
  }
  for (; d < end; d += V::kLanes) {
    const int count = end - d < V::kLanes ? static_cast<int>(end - d) : V::kLanes;
    typename V::Register a[K];
    for (int k = 0; k < K; ++k) a[k] = V::load_some(A + k * width + d, count);
    for (int i = 0; i < R; ++i) {
      const typename V::Register x = V::load_some(h[i] + d, count);
      for (int k = 0; k < K; ++k) sum[i][k][0] = V::multiply_add(a[k], x, sum[i][k][0]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < C; ++c) total[i][k][c] = sum[i][k][c];
}

// z[k * kRows + i] = A[k] . h[i] for K ranks and `groups` groups of R rows.
template <class V, class T, int R, int K, int C>
inline void project_ranks(const T* const* h, int groups, const T* A, int64_t width, float* z) {
  typename V::Sum sum[kRows / R][R][K][C];
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < R; ++i)
      for (int k = 0; k < K; ++k)
        for (int c = 0; c < C; ++c) sum[g][i][k][c] = V::zero();
  for (int64_t begin = 0; begin < width; begin += kTile) {
    const int64_t end = begin + kTile < width ? begin + kTile : width;
    for (int g = 0; g < groups; ++g) accumulate<V, T, R, K, C>(h + g * R, A, width, begin, end, sum[g]);
  }
  for (int g = 0; g < groups; ++g) {
    for (int k = 0; k < K; ++k) {
      for (int i = 0; i < R; ++i) {
        for (int c = 1; c < C; ++c) sum[g][i][k][0] = V::add(sum[g][i][k][0], sum[g][i][k][c]);
        z[k * kRows + g * R + i] = V::total(sum[g][i][k][0]);
      }
    }
  }
}

template <class V, class T, int R>
inline void project_rows(const T* const* h, int groups, const T* A, int64_t rank, int64_t width, float* z) {
  constexpr int K = V::kRanks;
  int64_t k = 0;
  for (; k + K <= rank; k += K) project_ranks<V, T, R, K, R == 1 ? 4 : 1>(h, groups, A + k * width, width, z + k * kRows);
  for (; k + 2 <= rank; k += 2) project_ranks<V, T, R, 2, R == 1 ? 4 : 2>(h, groups, A + k * width, width, z + k * kRows);
  for (; k < rank; ++k) project_ranks<V, T, R, 1, R == 1 ? 4 : 2>(h, groups, A + k * width, width, z + k * kRows);
}

// C vectors of R rows, from column d, through all ranks; each value is rounded to T once, at the end.
template <class V, class T, int R, int C>
inline void expand_columns(const T* const* h, T* const* y, const T* U, int64_t rank, int64_t width, int64_t d, const float* z) {
  typename V::Register sum[R][C];
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) sum[i][c] = V::load(h[i] + d + c * V::kLanes);
  for (int64_t k = 0; k < rank; ++k) {
    typename V::Register u[C];
    for (int c = 0; c < C; ++c) u[c] = V::load(U + k * width + d + c * V::kLanes);
    for (int i = 0; i < R; ++i) {
      const typename V::Sum factor = V::broadcast(z[k * kRows + i]);
      for (int c = 0; c < C; ++c) sum[i][c] = V::multiply_add(factor, u[c], sum[i][c]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) V::store(y[i] + d + c * V::kLanes, sum[i][c]);
}

// Columns [begin, end) of one group of R rows.
template <class V, class T, int R>
inline void expand_tile(const T* const* h, T* const* y, const T* U, int64_t rank, int64_t width, int64_t begin, int64_t end, const float* z) {
  constexpr int C = V::kColumns;
  int64_t d = begin;
  for (; d + C * V::kLanes <= end; d += C * V::kLanes) expand_columns<V, T, R, C>(h, y, U, rank, width, d, z);
  for (; d + V::kLanes <= end; d += V::kLanes) expand_columns<V, T, R, 1>(h, y, U, rank, width, d, z);
  if (d == end) return;
  const int count = static_cast<int>(end - d);
  for (int i = 0; i < R; ++i) {
    typename V::Register sum = V::load_some(h[i] + d, count);
    for (int64_t k = 0; k < rank; ++k) {
      sum = V::multiply_add(V::broadcast(z[k * kRows + i]), V::load_some(U + k * width + d, count), sum);
    }
    V::store_some(y[i] + d, sum, count);
  }
}

// A block in groups of kGroup rows, what is left over row by row.
template <class V, class T>
void project(const void* const* h, int rows, const void* A, int64_t rank, int64_t width, float* z) {
  const T* const* row = reinterpret_cast<const T* const*>(h);
  const T* bank = static_cast<const T*>(A);
  const int grouped = rows - rows % kGroup;
  if (grouped > 0) project_rows<V, T, kGroup>(row, grouped / kGroup, bank, rank, width, z);
  if (rows > grouped) project_rows<V, T, 1>(row + grouped, rows - grouped, bank, rank, width, z + grouped);
}

template <class V, class T>
void expand(const void* const* h, void* const* y, int rows, const void* U, int64_t rank, int64_t width, const float* z) {
  const T* const* from = reinterpret_cast<const T* const*>(h);
  T* const* to = reinterpret_cast<T* const*>(y);
  const T* bank = static_cast<const T*>(U);
  for (int64_t begin = 0; begin < width; begin += kTile) {
    const int64_t end = begin + kTile < width ? begin + kTile : width;
    int i = 0;
    for (; i + kGroup <= rows; i += kGroup) expand_tile<V, T, kGroup>(from + i, to + i, bank, rank, width, begin, end, z + i);
    for (; i < rows; ++i) expand_tile<V, T, 1>(from + i, to + i, bank, rank, width, begin, end, z + i);
  }
}

// C vectors of a row from column d. All are loaded before one is stored: y may be h.
template <class V, class T, int C>
inline void scale_columns(const T* h, T* y, const T* scale, const T* bias, int64_t d) {
  typename V::Register out[C];
  for (int c = 0; c < C; ++c) {
    const int64_t column = d + c * V::kLanes;
    out[c] = V::multiply_add(V::load(scale + column), V::load(h + column), V::load(bias + column));
  }
  for (int c = 0; c < C; ++c) V::store(y + d + c * V::kLanes, out[c]);
}

// Row by row, which the processor's prefetching follows: as fast as a copy from memory, where groups of rows were 1.4 times slower
// (docs/benchmarks.md).
template <class V, class T>
void scale_rows(const void* const* h, void* const* y, int rows, const void* scale, const void* bias, int64_t width) {
  const T *s = static_cast<const T*>(scale), *b = static_cast<const T*>(bias);
  constexpr int C = 4;
  for (int i = 0; i < rows; ++i) {
    const T* from = static_cast<const T*>(h[i]);
    T* to = static_cast<T*>(y[i]);
    int64_t d = 0;
    for (; d + C * V::kLanes <= width; d += C * V::kLanes) scale_columns<V, T, C>(from, to, s, b, d);
    for (; d + V::kLanes <= width; d += V::kLanes) scale_columns<V, T, 1>(from, to, s, b, d);
    if (d == width) continue;
    const int count = static_cast<int>(width - d);
    V::store_some(to + d, V::multiply_add(V::load_some(s + d, count), V::load_some(from + d, count), V::load_some(b + d, count)), count);
  }
}

// Twice V's lanes, those at even and those at odd places in a vector each: what the vectors of bfloat16 have in common, of which an
// instruction set adds how they are loaded and stored.
template <class V>
struct Pairs {
  using Sum = typename V::Register;
  struct Register {
    Sum even, odd;
  };
  static constexpr int kLanes = 2 * V::kLanes;

  static inline Sum zero() { return V::zero(); }
  static inline Sum broadcast(float x) { return V::broadcast(x); }
  static inline Sum add(Sum a, Sum b) { return V::add(a, b); }
  static inline float total(Sum a) { return V::total(a); }
  static inline Sum multiply_add(Register a, Register b, Sum c) { return V::multiply_add(a.odd, b.odd, V::multiply_add(a.even, b.even, c)); }
  static inline Register multiply_add(Sum a, Register b, Register c) {
    return {V::multiply_add(a, b.even, c.even), V::multiply_add(a, b.odd, c.odd)};
  }
  static inline Register multiply_add(Register a, Register b, Register c) {
    return {V::multiply_add(a.even, b.even, c.even), V::multiply_add(a.odd, b.odd, c.odd)};
  }
};

// The end of a row for a V without masked loads.
template <class V, class T>
inline typename V::Register load_first(const T* p, int count) {
  T lanes[V::kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return V::load(lanes);
}

template <class V, class T>
inline void store_first(T* p, typename V::Register a, int count) {
  T lanes[V::kLanes];
  V::store(lanes, a);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

// B: the vectors of bfloat16.
template <class V, class B = V>
constexpr RowKernels row_kernels_of(const char* name) {
  return {name,
          {project<V, float>, project<V, Float16>, project<B, BFloat16>},
          {expand<V, float>, expand<V, Float16>, expand<B, BFloat16>},
          {scale_rows<V, float>, scale_rows<V, Float16>, scale_rows<B, BFloat16>}};
}

}  // namespace
}  // namespace reft
