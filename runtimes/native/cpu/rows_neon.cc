// Rows for AArch64's Advanced SIMD, which every 64-bit Arm core has; its float16 conversions are part of it.

#include <arm_neon.h>

#include "cpu/rows.h"

namespace reft {
namespace {

struct Neon {
  using Register = float32x4_t;
  using Sum = Register;
  static constexpr int kLanes = 4, kRanks = 4, kColumns = 4;

  static inline Register zero() { return vdupq_n_f32(0.0f); }
  static inline Register broadcast(float x) { return vdupq_n_f32(x); }
  static inline Register multiply_add(Register a, Register b, Register c) { return vfmaq_f32(c, a, b); }
  static inline Register add(Register a, Register b) { return vaddq_f32(a, b); }
  static inline float total(Register a) { return vaddvq_f32(a); }

  static inline Register load(const float* p) { return vld1q_f32(p); }
  static inline Register load(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))); }

  static inline void store(float* p, Register a) { vst1q_f32(p, a); }
  static inline void store(Float16* p, Register a) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a)));
  }

  template <class T>
  static inline Register load_some(const T* p, int count) {
    return load_first<Neon>(p, count);
  }
  template <class T>
  static inline void store_some(T* p, Register a, int count) {
    store_first<Neon>(p, a, count);
  }
};

// Eight bfloat16 values in two vectors, those at even and those at odd places, as in rows_avx2.cc: a load and two instructions for eight
// values, and an insertion in place of two narrowings when they are stored.
struct NeonBFloat16 : Pairs<Neon> {
  static constexpr int kRanks = 4, kColumns = 2;

  static inline Register load(const BFloat16* p) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    return {vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)), vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)))};
  }
  // The nearest bfloat16 in the upper half of each lane, what is below it undefined.
  static inline uint32x4_t rounded(float32x4_t a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(a, a), nearest, vorrq_u32(bits, vdupq_n_u32(0x400000)));
  }
  static inline void store(BFloat16* p, Register a) {
    const uint32x4_t pairs = vsriq_n_u32(rounded(a.odd), rounded(a.even), 16);
    vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_u32(pairs));
  }

  static inline Register load_some(const BFloat16* p, int count) { return load_first<NeonBFloat16>(p, count); }
  static inline void store_some(BFloat16* p, Register a, int count) { store_first<NeonBFloat16>(p, a, count); }
};

}  // namespace

const RowKernels kNeonRows = row_kernels_of<Neon, NeonBFloat16>("neon");

}  // namespace reft
