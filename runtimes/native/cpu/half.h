// float16 and bfloat16 to and from float32, one value at a time, rounding to nearest even; no instruction set is assumed.
//
// Everything is static: these functions are compiled once per instruction set, and the linker must never take one for another.
#pragma once

#include <cstdint>
#include <cstring>

#include "reft/edit.h"

namespace reft {

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

static inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  uint32_t bits = magnitude + (112u << 23);  // the exponent's bias is 15 here and 127 there
  if (magnitude >= 0x7c00u << 13) {
    bits = magnitude + (224u << 23);  // infinity and NaN
  } else if (magnitude < 0x0400u << 13) {
    bits = bits_of_float(float_of_bits(magnitude + (113u << 23)) - float_of_bits(113u << 23));  // subnormal
  }
  return float_of_bits(sign | bits);
}

static inline void from_float(float value, float* out) { *out = value; }

static inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

static inline void from_float(float value, Float16* out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and more, infinity, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds to a multiple of 2^-24
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half);
}

}  // namespace reft
