#include "c_api/reft.h"

#include <cstdio>
#include <string>

#include "cpu/edit_cpu.h"
#include "cuda/edit_cuda.h"
#include "ort/statistics.h"
#include "reft/edit.h"

namespace reft {

Statistics statistics;

namespace {

thread_local char last_message[256];

template <class... Arguments>
const char* refused(const char* format, Arguments... arguments) {
  std::snprintf(last_message, sizeof last_message, format, arguments...);
  return last_message;
}

const char* check_dtype(const char* op, int dtype) {
  if (dtype == 1 || dtype == 10 || dtype == 16) return nullptr;
  return refused("%s: dtype is %d, expected 1 (float32), 10 (float16) or 16 (bfloat16)", op, dtype);
}

// Null when everything fits; fills the parts of the edit that come as names and numbers.
const char* check(int dtype, const char* activation, const char* activated, Edit* edit) {
  if (const char* error = check_dtype("LoReFT", dtype)) return error;
  edit->dtype = static_cast<DType>(dtype);
  if (!parse_activation(activation, &edit->activation)) {
    return refused("LoReFT: activation is '%.64s', expected one of %s", activation, kActivationNames);
  }
  if (!parse_activated(activated, &edit->first_half)) {
    return refused("LoReFT: activated is '%.64s', expected all or first_half", activated);
  }
  if (edit->tokens < 0 || edit->slots < 1 || edit->rank < 1 || edit->rank > kMaxRank || edit->width < 0) {
    return refused("LoReFT: tokens %lld, slots %lld, rank %lld and width %lld, expected at least 0, 1, 1 (up to %lld) and 0",
                   static_cast<long long>(edit->tokens), static_cast<long long>(edit->slots), static_cast<long long>(edit->rank),
                   static_cast<long long>(edit->width), static_cast<long long>(kMaxRank));
  }
  return nullptr;
}

const char* check(int dtype, RedEdit* edit) {
  if (const char* error = check_dtype("RED", dtype)) return error;
  edit->dtype = static_cast<DType>(dtype);
  if (edit->tokens < 0 || edit->slots < 1 || edit->width < 0) {
    return refused("RED: tokens %lld, slots %lld and width %lld, expected at least 0, 1 and 0", static_cast<long long>(edit->tokens),
                   static_cast<long long>(edit->slots), static_cast<long long>(edit->width));
  }
  return nullptr;
}

template <class AnyEdit>
const char* run_on_cpu(const char* op, const AnyEdit& edit, const char* kernels) {
  const RowKernels* const* chosen = usable_row_kernels();
  while (*chosen != nullptr && kernels != nullptr && std::strcmp((*chosen)->name, kernels) != 0) ++chosen;
  if (*chosen == nullptr) return refused("%s: kernels '%.64s' do not run here, expected one of %s", op, kernels, reft_cpu_kernels());
  edit_tokens(edit, 0, edit.tokens, **chosen);
  return nullptr;
}

// how: the stream, and what else the op's launcher takes.
template <class AnyEdit, class... How>
const char* run_on_cuda(const char* op, const AnyEdit& edit, How... how) {
#ifdef REFT_CUDA
  if (const char* error = launch_edit(edit, how...)) return refused("%s: CUDA launch failed: %s", op, error);
  return nullptr;
#else
  static_cast<void>(edit);
  (static_cast<void>(how), ...);
  return refused("%s: %s", op, "this build has no CUDA kernels; install from source where nvcc is on the path");
#endif
}

}  // namespace
}  // namespace reft

const char* reft_edit_cpu(int dtype, const void* h, void* y, const int32_t* slot, const void* U, const void* A, const void* b,
                          int64_t tokens, int64_t slots, int64_t rank, int64_t width, const char* activation, const char* activated,
                          const char* kernels) {
  reft::Edit edit{{}, {}, {}, h, y, slot, U, A, b, tokens, slots, rank, width};
  if (const char* error = reft::check(dtype, activation, activated, &edit)) return error;
  return reft::run_on_cpu("LoReFT", edit, kernels);
}

const char* reft_edit_cuda(int dtype, const void* h, void* y, const int32_t* slot, const void* U, const void* A, const void* b,
                           int64_t tokens, int64_t slots, int64_t rank, int64_t width, const char* activation, const char* activated,
                           void* workspace, void* stream) {
  reft::Edit edit{{}, {}, {}, h, y, slot, U, A, b, tokens, slots, rank, width};
  if (const char* error = reft::check(dtype, activation, activated, &edit)) return error;
  return reft::run_on_cuda("LoReFT", edit, stream, workspace);
}

int64_t reft_edit_cuda_workspace(int64_t tokens, int64_t rank) {
#ifdef REFT_CUDA
  return reft::workspace_bytes(tokens, rank);
#else
  static_cast<void>(tokens), static_cast<void>(rank);
  return 0;
#endif
}

const char* reft_red_cpu(int dtype, const void* h, void* y, const int32_t* slot, const void* scale, const void* bias, int64_t tokens,
                         int64_t slots, int64_t width, const char* kernels) {
  reft::RedEdit edit{{}, h, y, slot, scale, bias, tokens, slots, width};
  if (const char* error = reft::check(dtype, &edit)) return error;
  return reft::run_on_cpu("RED", edit, kernels);
}

const char* reft_red_cuda(int dtype, const void* h, void* y, const int32_t* slot, const void* scale, const void* bias, int64_t tokens,
                          int64_t slots, int64_t width, void* stream) {
  reft::RedEdit edit{{}, h, y, slot, scale, bias, tokens, slots, width};
  if (const char* error = reft::check(dtype, &edit)) return error;
  return reft::run_on_cuda("RED", edit, stream);
}

const char* reft_cpu_kernels() {
  static const std::string names = [] {
    std::string joined;
    for (const reft::RowKernels* const* kernels = reft::usable_row_kernels(); *kernels != nullptr; ++kernels) {
      joined += (joined.empty() ? "" : ",") + std::string((*kernels)->name);
    }
    return joined;
  }();
  return names.c_str();
}

const char* reft_cuda_architectures() {
#ifdef REFT_CUDA
  return REFT_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

void reft_statistics(int64_t counts[4], int reset) {
  std::atomic<int64_t>* all[4] = {&reft::statistics.calls, &reft::statistics.in_place, &reft::statistics.edited_rows,
                                  &reft::statistics.threaded};
  for (int i = 0; i < 4; ++i) counts[i] = reset ? all[i]->exchange(0) : all[i]->load();
}
