// ai.reft::RED for ONNX Runtime: checks what comes in, forwards to the kernels, computes nothing itself.

#include <new>

#include "ort/op.h"

namespace reft::ort {
namespace {

// h [.., D], slot [..], scale and bias [N, D]; null when they fit.
Status check(const Kernel& kernel, const Tensor& h, const Tensor& slot, const Tensor& scale, const Tensor& bias) {
  const Api* api = kernel.api;
  const int element = static_cast<int>(kernel.dtype);
  if (Status status = check_tokens(kernel, h, slot)) return status;
  if (h.element != element || scale.element != element || bias.element != element) {
    return refused(api, "RED: h, scale and bias are %s, %s and %s, expected %s", type_name(h.element), type_name(scale.element),
                   type_name(bias.element), type_name(element));
  }
  const int64_t width = h.dims[h.rank - 1];
  if (scale.rank != 2 || scale.dims[1] != width || scale.dims[0] < 1) {
    return refused(api, "RED: scale has shape %s, expected [N, %lld] with N >= 1, D being that of h %s", Shown(scale).text,
                   static_cast<long long>(width), Shown(h).text);
  }
  if (bias.rank != 2 || bias.dims[0] != scale.dims[0] || bias.dims[1] != width) {
    return refused(api, "RED: bias has shape %s, expected %s, the shape of scale", Shown(bias).text, Shown(scale).text);
  }
  return nullptr;
}

// The edit that the node's inputs ask for, checked, with its output allocated.
Status read_edit(const Kernel& kernel, Context* context, RedEdit* edit) {
  Tensor h, slot, scale, bias, y;
  Tensor* const inputs[] = {&h, &slot, &scale, &bias};
  if (Status status = read_inputs(kernel, context, "h, slot, scale and bias", inputs, 4)) return status;
  if (Status status = check(kernel, h, slot, scale, bias)) return status;
  if (Status status = allocate_output(kernel.api, context, h, &y)) return status;
  *edit = {kernel.dtype, h.data,       y.data,        static_cast<const int32_t*>(slot.data), scale.data,
           bias.data,    tokens_of(h), scale.dims[0], h.dims[h.rank - 1]};
  return nullptr;
}

Status compute(void* state, Context* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  RedEdit edit;
  if (Status status = read_edit(kernel, context, &edit)) return status;
  // Bound by memory as a copy is: scale and bias stay in the cache.
  return run_edit(kernel, context, edit, 1);
}

Status create_kernel(const CustomOp* op, const Api* api, const KernelInfo*, void** out) {
  *out = new (std::nothrow) Kernel(kernel_of(op, api));
  return *out != nullptr ? nullptr : CreateStatus::call(api, kFail, "RED: out of memory");
}

}  // namespace

const Definition kRed = {"RED", 4, create_kernel, compute, [](void* kernel) { delete static_cast<Kernel*>(kernel); }};

}  // namespace reft::ort
