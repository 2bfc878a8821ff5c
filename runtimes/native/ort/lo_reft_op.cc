// ai.reft::LoReFT for ONNX Runtime: checks what comes in, forwards to the kernels, computes nothing itself.

#include <cstdio>
#include <cstring>
#include <new>

#include "ort/op.h"

namespace reft::ort {
namespace {

struct LoReftKernel : Kernel {
  Activation activation = Activation::kNone;
  bool first_half = false;
};

// h [.., D], slot [..], U and A [N, r, D], b [N, r]; null when they fit.
Status check(const Kernel& kernel, const Tensor& h, const Tensor& slot, const Tensor& U, const Tensor& A, const Tensor& b) {
  const Api* api = kernel.api;
  const int element = static_cast<int>(kernel.dtype);
  if (Status status = check_tokens(kernel, h, slot)) return status;
  if (h.element != element || U.element != element || A.element != element || b.element != element) {
    return refused(api, "LoReFT: h, U, A and b are %s, %s, %s and %s, expected %s", type_name(h.element), type_name(U.element),
                   type_name(A.element), type_name(b.element), type_name(element));
  }
  const int64_t width = h.dims[h.rank - 1];
  if (U.rank != 3 || U.dims[2] != width || U.dims[0] < 1 || U.dims[1] < 1 || U.dims[1] > kMaxRank) {
    return refused(api, "LoReFT: U has shape %s, expected [N, r, %lld] with N >= 1 and r from 1 to %lld, D being that of h %s",
                   Shown(U).text, static_cast<long long>(width), static_cast<long long>(kMaxRank), Shown(h).text);
  }
  if (A.rank != 3 || A.dims[0] != U.dims[0] || A.dims[1] != U.dims[1] || A.dims[2] != width) {
    return refused(api, "LoReFT: A has shape %s, expected %s, the shape of U", Shown(A).text, Shown(U).text);
  }
  if (b.rank != 2 || b.dims[0] != U.dims[0] || b.dims[1] != U.dims[1]) {
    return refused(api, "LoReFT: b has shape %s, expected %s, [N, r] of U %s", Shown(b).text, Shown(U.dims, 2).text, Shown(U).text);
  }
  return nullptr;
}

// The edit that the node's inputs ask for, checked, with its output allocated.
Status read_edit(const LoReftKernel& kernel, Context* context, Edit* edit) {
  Tensor h, slot, U, A, b, y;
  Tensor* const inputs[] = {&h, &slot, &U, &A, &b};
  if (Status status = read_inputs(kernel, context, "h, slot, U, A and b", inputs, 5)) return status;
  if (Status status = check(kernel, h, slot, U, A, b)) return status;
  if (Status status = allocate_output(kernel.api, context, h, &y)) return status;
  *edit = {kernel.dtype, kernel.activation, kernel.first_half, h.data,       y.data,    static_cast<const int32_t*>(slot.data),
           U.data,       A.data,            b.data,            tokens_of(h), U.dims[0], U.dims[1],
           h.dims[h.rank - 1]};
  return nullptr;
}

Status compute(void* state, Context* context) {
  const LoReftKernel& kernel = *static_cast<LoReftKernel*>(state);
  Edit edit;
  if (Status status = read_edit(kernel, context, &edit)) return status;
  // Copying a row costs about as much as one rank of editing it.
  return run_edit(kernel, context, edit, edit.rank + 1);
}

bool succeeded(const Api* api, Status status) {
  if (status != nullptr) ReleaseStatus::call(api, status);
  return status == nullptr;
}

// The attribute as text, or default_text where the node does not have it; an error where it is there, but not a short string.
Status read_attribute(const Api* api, const KernelInfo* info, const char* name, const char* default_text, char* text, size_t capacity) {
  size_t size = capacity;
  Status status = GetAttributeString::call(api, info, name, text, &size);
  if (status == nullptr) return nullptr;
  // One error code stands for everything; its text has been the same from 1.18 to 1.31.
  const bool absent = std::strstr(GetErrorMessage::call(api, status), "No attribute") != nullptr;
  ReleaseStatus::call(api, status);
  if (absent) {
    std::snprintf(text, capacity, "%s", default_text);
    return nullptr;
  }
  size = 0;
  if (succeeded(api, GetAttributeString::call(api, info, name, nullptr, &size))) {
    return refused(api, "LoReFT: attribute %s has %d characters, expected a short name", name, static_cast<int>(size) - 1);
  }
  int64_t integer = 0;
  if (succeeded(api, GetAttributeInt64::call(api, info, name, &integer))) {
    return refused(api, "LoReFT: attribute %s is the integer %lld, expected a string", name, static_cast<long long>(integer));
  }
  float number = 0.0f;
  if (succeeded(api, GetAttributeFloat::call(api, info, name, &number))) {
    return refused(api, "LoReFT: attribute %s is the number %g, expected a string", name, static_cast<double>(number));
  }
  return refused(api, "LoReFT: attribute %s is a list, a tensor or a graph, expected a string", name);
}

void release_memory(const Kernel& kernel) {
  if (kernel.memory != nullptr) ReleaseAllocator::call(kernel.api, kernel.memory);
}

Status create_kernel(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) {
  char activation[64], activated[64];
  if (Status status = read_attribute(api, info, "activation", "", activation, sizeof activation)) return status;
  if (Status status = read_attribute(api, info, "activated", "all", activated, sizeof activated)) return status;
  LoReftKernel kernel{kernel_of(op, api)};
  if (!parse_activation(activation, &kernel.activation)) {
    return refused(api, "LoReFT: attribute activation is '%s', expected one of %s", activation, kActivationNames);
  }
  if (!parse_activated(activated, &kernel.first_half)) {
    return refused(api, "LoReFT: attribute activated is '%s', expected all or first_half", activated);
  }
  if (kernel.on_cuda) {
    if (Status status = KernelInfoGetAllocator::call(api, info, kMemoryDefault, &kernel.memory)) return status;
  }
  *out = new (std::nothrow) LoReftKernel(kernel);
  if (*out != nullptr) return nullptr;
  release_memory(kernel);
  return CreateStatus::call(api, kFail, "LoReFT: out of memory");
}

void destroy_kernel(void* state) {
  const auto* kernel = static_cast<LoReftKernel*>(state);
  release_memory(*kernel);
  delete kernel;
}

}  // namespace

const Definition kLoReft = {"LoReFT", 5, create_kernel, compute, destroy_kernel};

}  // namespace reft::ort
