// The edit on the CPU.
#pragma once

#include "cpu/row_kernels.h"
#include "reft/edit.h"

namespace reft {

// Every instruction set that this build has and this processor runs, the fastest first; ends with nullptr.
const RowKernels* const* usable_row_kernels();

// y of the tokens [begin, end); in place the tokens outside the bank cost nothing but the look at their slots.
// The caller has checked the edit: shapes fit, rank in [1, kMaxRank], h and y the same or apart.
void edit_tokens(const Edit& edit, int64_t begin, int64_t end, const RowKernels& kernels);
void edit_tokens(const RedEdit& edit, int64_t begin, int64_t end, const RowKernels& kernels);

// How many of the slots are inside the bank.
int64_t count_edited(const int32_t* slot, int64_t tokens, int64_t slots);

}  // namespace reft
