// Rows for AVX2, FMA and F16C (x86-64 since 2013).

#include <immintrin.h>

#include "cpu/rows.h"

namespace reft {
namespace {

struct Avx2 {
  using Register = __m256;
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
  static inline Register load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }

  static inline void store(float* p, Register a) { _mm256_storeu_ps(p, a); }
  static inline void store(Float16* p, Register a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline void store(BFloat16* p, Register a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i out = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  template <class T>
  static inline Register load_some(const T* p, int count) {
    T lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  template <class T>
  static inline void store_some(T* p, Register a, int count) {
    T lanes[kLanes];
    store(lanes, a);
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
  }
};

}  // namespace

const RowKernels kAvx2Rows = row_kernels_of<Avx2>("avx2");

}  // namespace reft
