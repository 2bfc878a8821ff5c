// Rows for AVX2, FMA and F16C (x86-64 since 2013).

#include <immintrin.h>

#include "cpu/rows.h"

namespace reft {
namespace {

struct Avx2 {
  using Register = __m256;
  using Sum = Register;
  // Sixteen registers: eight sums, their operands beside them.
  static constexpr int kLanes = 8, kRanks = 2, kColumns = 2;

  static inline Register zero() { return _mm256_setzero_ps(); }
  static inline Register broadcast(float x) { return _mm256_set1_ps(x); }
  static inline Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static inline float total(Register a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  static inline Register load(const float* p) { return _mm256_loadu_ps(p); }
  static inline Register load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  static inline void store(float* p, Register a) { _mm256_storeu_ps(p, a); }
  static inline void store(Float16* p, Register a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  template <class T>
  static inline Register load_some(const T* p, int count) {
    return load_first<Avx2>(p, count);
  }
  template <class T>
  static inline void store_some(T* p, Register a, int count) {
    store_first<Avx2>(p, a, count);
  }
};

// Sixteen bfloat16 values in two vectors, those at even and those at odd places: one instruction makes floats of either, where widening
// values in their order takes a shuffle, which every processor has only one unit for. No sum cares about the order, and each value goes back
// where it came from.
struct Avx2BFloat16 : Pairs<Avx2> {
  static constexpr int kRanks = 2, kColumns = 1;

  static inline Register load(const BFloat16* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(odd)};
  }
  // The nearest bfloat16 in the upper half of each lane, what is below it undefined.
  static inline __m256i rounded(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(nearest, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
  }
  static inline void store(BFloat16* p, Register a) {
    const __m256i pairs = _mm256_blend_epi16(_mm256_srli_epi32(rounded(a.even), 16), rounded(a.odd), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs);
  }

  static inline Register load_some(const BFloat16* p, int count) { return load_first<Avx2BFloat16>(p, count); }
  static inline void store_some(BFloat16* p, Register a, int count) { store_first<Avx2BFloat16>(p, a, count); }
};

}  // namespace

const RowKernels kAvx2Rows = row_kernels_of<Avx2, Avx2BFloat16>("avx2");

}  // namespace reft
