// Rows for AArch64's Advanced SIMD, which every 64-bit Arm core has; its float16 conversions are part of it.

#include <arm_neon.h>

#include "cpu/rows.h"

namespace reft {
namespace {

struct Neon {
  using Register = float32x4_t;
  static constexpr int kLanes = 4, kRanks = 4, kColumns = 4;

  static inline Register zero() { return vdupq_n_f32(0.0f); }
  static inline Register broadcast(float x) { return vdupq_n_f32(x); }
  static inline Register multiply_add(Register a, Register b, Register c) { return vfmaq_f32(c, a, b); }
  static inline Register add(Register a, Register b) { return vaddq_f32(a, b); }
  static inline float total(Register a) { return vaddvq_f32(a); }

  static inline uint16x4_t words(const void* p) { return vld1_u16(static_cast<const uint16_t*>(p)); }
  static inline Register load(const float* p) { return vld1q_f32(p); }
  static inline Register load(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(words(p))); }
  static inline Register load(const BFloat16* p) { return vreinterpretq_f32_u32(vshll_n_u16(words(p), 16)); }

  static inline void store_words(void* p, uint16x4_t a) { vst1_u16(static_cast<uint16_t*>(p), a); }
  static inline void store(float* p, Register a) { vst1q_f32(p, a); }
  static inline void store(Float16* p, Register a) { store_words(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static inline void store(BFloat16* p, Register a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    store_words(p, vmovn_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet)));
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

const RowKernels kNeonRows = row_kernels_of<Neon>("neon");

}  // namespace reft
