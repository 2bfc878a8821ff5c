// What the ops of this library share as custom ops of ONNX Runtime: inputs h [.., D] and slot [..] with banks behind them, one output of
// the shape of h that may take h's place, work spread over the session's threads, errors.
//
// Every status is looked at. An error names the op, what came and what was expected; onnxruntime adds the node's name.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/edit_cpu.h"
#include "ort/ort_abi.h"
#include "ort/statistics.h"
#include "reft/edit.h"

namespace reft::ort {

struct Op : CustomOp {
  const char* name;
  size_t inputs;
  DType dtype;           // of h, of every input but slot, and of y
  const char* provider;  // null: the CPU
};

// What is the op's own; everything else is the same for all.
struct Definition {
  const char* name;
  size_t inputs;
  Status (*create)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel);
  Status (*compute)(void* kernel, Context* context);
  void (*destroy)(void* kernel);
};
extern const Definition kLoReft;
extern const Definition kRed;

// One op per type of h and provider.
#ifdef REFT_CUDA
constexpr const char* kProviders[] = {nullptr, "CUDAExecutionProvider"};
#else
constexpr const char* kProviders[] = {nullptr};
#endif
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

Op make_op(const Definition& definition, DType dtype, const char* provider);

struct Kernel {
  const Api* api;
  const char* op;
  DType dtype;
  bool on_cuda;
  Allocator* memory = nullptr;  // the provider's, where the op takes scratch from it
};
inline Kernel kernel_of(const CustomOp* op, const Api* api) {
  const Op& self = *static_cast<const Op*>(op);
  return {api, self.name, self.dtype, self.provider != nullptr};
}

struct Library {
  const Api* api = nullptr;
  uint32_t release = 0;  // the minor version of the onnxruntime that loaded us
};
extern Library library;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
Status refused(const Api* api, const char* format, ...);

const char* type_name(int element);

constexpr size_t kShownDimensions = 8;

struct Tensor {
  Value* value = nullptr;
  void* data = nullptr;
  int element = 0;
  size_t rank = 0;
  const int64_t* dims = nullptr;
  int64_t copied[kShownDimensions] = {};
};

// "[2, 5, 64]"
struct Shown {
  char text[160];
  Shown(const int64_t* dims, size_t rank);
  explicit Shown(const Tensor& tensor) : Shown(tensor.dims, tensor.rank) {}
};

// Null where the inputs of the node are there; names: "h, slot, U, A and b".
Status read_inputs(const Kernel& kernel, const Context* context, const char* names, Tensor* const* inputs, size_t count);

// Null where h is [tokens, D] or [batch, sequence, D], and slot int32 with one value per token.
Status check_tokens(const Kernel& kernel, const Tensor& h, const Tensor& slot);

// The output, of the shape of h; counts the call.
Status allocate_output(const Api* api, Context* context, const Tensor& h, Tensor* y);

int64_t tokens_of(const Tensor& h);

// Elements that one thread copies in about ten microseconds: less work does not pay for waking another.
constexpr int64_t kWorthSharing = 1 << 18;

#ifdef REFT_CUDA
// Queues the edit on the provider's stream and returns at once.
Status queue_edit(const Kernel& kernel, const Context* context, const Edit& edit);
Status queue_edit(const Kernel& kernel, const Context* context, const RedEdit& edit);
#endif

// The edit, queued on the provider's stream or computed on the session's threads. row_cost: what editing a row costs on the CPU, where
// copying it costs 1.
template <class AnyEdit>
Status run_edit(const Kernel& kernel, Context* context, const AnyEdit& edit, int64_t row_cost) {
#ifdef REFT_CUDA
  if (kernel.on_cuda) return queue_edit(kernel, context, edit);
#endif
  const int64_t edited = count_edited(edit.slot, edit.tokens, edit.slots);
  if (edited == 0 && edit.h == edit.y) return nullptr;
  statistics.edited_rows.fetch_add(edited, std::memory_order_relaxed);
  const int64_t copied = edit.h == edit.y ? 0 : edit.tokens - edited;
  if ((edited * row_cost + copied) * edit.width < kWorthSharing) {
    edit_tokens(edit, 0, edit.tokens, **usable_row_kernels());
    return nullptr;
  }
  statistics.threaded.fetch_add(1, std::memory_order_relaxed);
  // Small shares, since edited tokens often stand together; whole blocks, since a bank is read once per block.
  const auto share = [](void* shared, size_t index) {
    const AnyEdit& whole = *static_cast<const AnyEdit*>(shared);
    const int64_t begin = static_cast<int64_t>(index) * kRows;
    edit_tokens(whole, begin, begin + kRows < whole.tokens ? begin + kRows : whole.tokens, **usable_row_kernels());
  };
  const size_t count = static_cast<size_t>((edit.tokens + kRows - 1) / kRows);
  return ParallelFor::call(kernel.api, context, share, count, 0, const_cast<AnyEdit*>(&edit));
}

}  // namespace reft::ort
