// The table of functions that each instruction set fills.
#pragma once

#include <cstdint>

namespace reft {

// Rows that go through the arithmetic together: four rows by four ranks are sixteen sums, which AVX-512 and NEON keep in registers.
constexpr int kGroup = 4;

// Rows of one block. A bank is read from the second-level cache once per block, the groups of the block share it in the first level.
constexpr int kRows = 16;

// Columns that the groups of a block go through one after the other: four ranks of a float32 bank are 8 KiB of the first-level cache.
constexpr int64_t kTile = 512;

using Project = void (*)(const void* const* h, int rows, const void* A, int64_t rank, int64_t width, float* z);
using Scale = void (*)(const void* const* h, void* const* y, int rows, const void* scale, const void* bias, int64_t width);
using Expand = void (*)(const void* const* h, void* const* y, int rows, const void* U, int64_t rank, int64_t width, const float* z);

// By dtype, in the order float32, float16, bfloat16. rows is at most kRows; z is [rank, kRows].
struct RowKernels {
  const char* name;
  Project project[3];
  Expand expand[3];
  Scale scale[3];
};

extern const RowKernels kPortableRows;
#ifdef REFT_AVX2_ROWS
extern const RowKernels kAvx2Rows;
#endif
#ifdef REFT_AVX512_ROWS
extern const RowKernels kAvx512Rows;
#endif
#ifdef REFT_NEON_ROWS
extern const RowKernels kNeonRows;
#endif

}  // namespace reft
