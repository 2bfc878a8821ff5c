#include "cpu/edit_cpu.h"

#include "cpu/half.h"

namespace reft {
namespace {

int dtype_index(DType dtype) { return dtype == DType::kFloat32 ? 0 : dtype == DType::kFloat16 ? 1 : 2; }

float bias(const Edit& edit, int64_t index) {
  switch (edit.dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(edit.b)[index]);
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(edit.b)[index]);
    case DType::kFloat32:
      break;
  }
  return static_cast<const float*>(edit.b)[index];
}

// Rows of one slot on their way through the two kernels.
struct Block {
  const void* h[kRows];
  void* y[kRows];
  int rows = 0;
  int32_t slot = -1;
};

void edit_block(const Edit& edit, const RowKernels& kernels, const Block& block) {
  alignas(64) float z[kMaxRank * kRows];
  const int type = dtype_index(edit.dtype);
  const int64_t bank = edit.rank * edit.width * element_size(edit.dtype);
  kernels.project[type](block.h, block.rows, static_cast<const char*>(edit.A) + block.slot * bank, edit.rank, edit.width, z);
  const int64_t activated = activated_rows(edit);
  for (int64_t k = 0; k < edit.rank; ++k) {
    const float b = bias(edit, block.slot * edit.rank + k);
    for (int i = 0; i < block.rows; ++i) {
      const float sum = z[k * kRows + i] + b;
      z[k * kRows + i] = k < activated ? activate(sum, edit.activation) : sum;
    }
  }
  kernels.expand[type](block.h, block.y, block.rows, static_cast<const char*>(edit.U) + block.slot * bank, edit.rank, edit.width, z);
}

void edit_block(const RedEdit& edit, const RowKernels& kernels, const Block& block) {
  const int64_t bank = block.slot * edit.width * element_size(edit.dtype);
  const char *scale = static_cast<const char*>(edit.scale) + bank, *bias = static_cast<const char*>(edit.bias) + bank;
  kernels.scale[dtype_index(edit.dtype)](block.h, block.y, block.rows, scale, bias, edit.width);
}

// Gathers the tokens of [begin, end) that share a slot into blocks, and copies those that pass through where y is not h.
template <class AnyEdit>
void edit_in_blocks(const AnyEdit& edit, int64_t begin, int64_t end, const RowKernels& kernels) {
  const int64_t row = edit.width * element_size(edit.dtype);
  const char* h = static_cast<const char*>(edit.h);
  char* y = static_cast<char*>(edit.y);
  const bool in_place = h == y;
  Block block;
  int64_t passing = begin;  // where the tokens that pass through, and are not yet copied, begin
  for (int64_t t = begin; t < end; ++t) {
    const int32_t slot = edit.slot[t];
    if (!in_bank(slot, edit.slots)) continue;
    if (!in_place && passing < t) std::memcpy(y + passing * row, h + passing * row, static_cast<size_t>((t - passing) * row));
    passing = t + 1;
    if (block.rows > 0 && (slot != block.slot || block.rows == kRows)) {
      edit_block(edit, kernels, block);
      block.rows = 0;
    }
    block.slot = slot;
    block.h[block.rows] = h + t * row;
    block.y[block.rows++] = y + t * row;
  }
  if (block.rows > 0) edit_block(edit, kernels, block);
  if (!in_place && passing < end) std::memcpy(y + passing * row, h + passing * row, static_cast<size_t>((end - passing) * row));
}

#ifdef REFT_AVX512_ROWS
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef REFT_AVX2_ROWS
// Every processor with AVX2 and FMA has F16C, which older compilers cannot ask for by name.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

struct Usable {
  const RowKernels* kernels[4] = {};
  Usable() {
    int count = 0;
#if defined(REFT_AVX512_ROWS) || defined(REFT_AVX2_ROWS)
    __builtin_cpu_init();
#endif
#ifdef REFT_AVX512_ROWS
    if (has_avx512()) kernels[count++] = &kAvx512Rows;
#endif
#ifdef REFT_AVX2_ROWS
    if (has_avx2()) kernels[count++] = &kAvx2Rows;
#endif
#ifdef REFT_NEON_ROWS
    kernels[count++] = &kNeonRows;
#endif
    kernels[count++] = &kPortableRows;
  }
};

}  // namespace

const RowKernels* const* usable_row_kernels() {
  static const Usable usable;
  return usable.kernels;
}

int64_t count_edited(const int32_t* slot, int64_t tokens, int64_t slots) {
  int64_t count = 0;
  for (int64_t t = 0; t < tokens; ++t) count += in_bank(slot[t], slots);
  return count;
}

void edit_tokens(const Edit& edit, int64_t begin, int64_t end, const RowKernels& kernels) { edit_in_blocks(edit, begin, end, kernels); }
void edit_tokens(const RedEdit& edit, int64_t begin, int64_t end, const RowKernels& kernels) { edit_in_blocks(edit, begin, end, kernels); }

}  // namespace reft
