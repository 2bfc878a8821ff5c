// Which shapes the ops take, for shapes that are known exactly, within a profile's bounds, or not yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace reft::trt {

// The largest rank that the kernel is held against float64 at. reft::kMaxRank is what its shared memory would carry; an engine is built
// once and runs unattended, so it admits no more than was measured.
constexpr int64_t kPluginMaxRank = 256;

constexpr int kMaxDims = 8;
constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max();

// From low to high, both included: equal where the dimension is known, 0 to kUnbounded where nothing is known of it.
struct Extent {
  int64_t low = 0;
  int64_t high = kUnbounded;
};

struct Shape {
  int rank = 0;
  Extent dims[kMaxDims];
};

enum Input { kH, kSlot, kU, kA, kB, kInputs };
enum RedInput { kScale = kSlot + 1, kBias, kRedInputs };

// Both: false, with the reason, where no values within the bounds fit, or where the bounds of N or r reach beyond what the op takes.
//
// LoReFT: h [.., D] of rank 2 or 3, slot [..], U and A [N, r, D], b [N, r], N >= 1, r from 1 to kPluginMaxRank.
bool lo_reft_fits(const Shape* inputs, char* reason, size_t capacity);

// RED: h [.., D] of rank 2 or 3, slot [..], scale and bias [N, D], N >= 1.
bool red_fits(const Shape* inputs, char* reason, size_t capacity);

}  // namespace reft::trt
