// Rows for AVX-512 (F, BW, DQ and VL).

#include <immintrin.h>

#include "cpu/rows.h"

namespace reft {
namespace {

struct Avx512 {
  using Register = __m512;
  using Sum = Register;
  static constexpr int kLanes = 16, kRanks = 4, kColumns = 4;

  static inline Register zero() { return _mm512_setzero_ps(); }
  static inline Register broadcast(float x) { return _mm512_set1_ps(x); }
  static inline Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static inline float total(Register a) { return _mm512_reduce_add_ps(a); }
  static inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

  static inline Register widen(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }
  static inline Register widen(__m256i bits, BFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static inline __m256i narrow(Register a, Float16) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // AVX512_BF16's own conversion takes subnormals for zeros.
  static inline __m256i narrow(Register a, BFloat16) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
  }

  static inline Register load(const float* p) { return _mm512_loadu_ps(p); }
  template <class T>
  static inline Register load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
  }
  static inline Register load_some(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  template <class T>
  static inline Register load_some(const T* p, int count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), p), T{});
  }
  static inline void store(float* p, Register a) { _mm512_storeu_ps(p, a); }
  template <class T>
  static inline void store(T* p, Register a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
  }
  static inline void store_some(float* p, Register a, int count) { _mm512_mask_storeu_ps(p, first(count), a); }
  template <class T>
  static inline void store_some(T* p, Register a, int count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow(a, T{}));
  }
};

}  // namespace

const RowKernels kAvx512Rows = row_kernels_of<Avx512>("avx512");

}  // namespace reft
