#include "ort/op.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace reft::ort {

Library library;

Status refused(const Api* api, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return CreateStatus::call(api, kInvalidArgument, text);
}

const char* type_name(int element) {
  switch (element) {
    case 1:
      return "float32";
    case 6:
      return "int32";
    case 7:
      return "int64";
    case 10:
      return "float16";
    case 11:
      return "float64";
    case 16:
      return "bfloat16";
  }
  return "another type";
}

Shown::Shown(const int64_t* dims, size_t rank) {
  size_t used = static_cast<size_t>(std::snprintf(text, sizeof text, "["));
  for (size_t i = 0; i < rank && i < kShownDimensions; ++i) {
    used += static_cast<size_t>(std::snprintf(text + used, sizeof text - used, "%s%lld", i ? ", " : "", static_cast<long long>(dims[i])));
  }
  std::snprintf(text + used, sizeof text - used, rank > kShownDimensions ? ", ...]" : "]");
}

namespace {

Status read_shape_copy(const Api* api, Tensor* tensor) {
  ShapeInfo* info = nullptr;
  if (Status status = GetTensorTypeAndShape::call(api, tensor->value, &info)) return status;
  Status status = GetTensorElementType::call(api, info, &tensor->element);
  if (!status) status = GetDimensionsCount::call(api, info, &tensor->rank);
  if (!status) {
    const size_t count = tensor->rank < kShownDimensions ? tensor->rank : kShownDimensions;
    status = GetDimensions::call(api, info, tensor->copied, count);
  }
  tensor->dims = tensor->copied;
  ReleaseShapeInfo::call(api, info);
  return status;
}

Status read_input(const Kernel& kernel, const Context* context, const char* names, size_t index, Tensor* tensor) {
  const Api* api = kernel.api;
  const Value* value = nullptr;
  if (Status status = GetInput::call(api, context, index, &value)) return status;
  if (value == nullptr) return refused(api, "%s: input %d is missing, expected %s", kernel.op, static_cast<int>(index), names);
  tensor->value = const_cast<Value*>(value);
  if (Status status = GetTensorMutableData::call(api, tensor->value, &tensor->data)) return status;
  if (library.release < kShapeReferenceVersion) return read_shape_copy(api, tensor);
  return GetTypeAndShapeReference::call(api, value, &tensor->element, &tensor->dims, &tensor->rank);
}

// y has the shape of h. Without this onnxruntime does not know that h's buffer is large enough, and never computes in place.
Status infer_shape(const CustomOp*, ShapeInferContext* context) {
  const Api* api = library.api;
  ShapeInfo* h = nullptr;  // the context's
  if (Status status = GetInputShapeInfo::call(api, context, 0, &h)) return status;
  size_t rank = 0;
  if (Status status = GetDimensionsCount::call(api, h, &rank)) return status;
  // 0 stands for a shape that is not known at all; other ranks than 2 and 3 are refused when the op runs.
  if (rank != 2 && rank != 3) return nullptr;
  int64_t dims[3];
  const char* names[3];
  if (Status status = GetDimensions::call(api, h, dims, rank)) return status;
  if (Status status = GetSymbolicDimensions::call(api, h, names, rank)) return status;
  // onnxruntime writes an unknown dimension without a name as the number -1, and the inference of later nodes aborts on it: name it.
  static std::atomic<unsigned> count{0};
  char made[3][128];
  bool renamed = false;
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0 && names[i][0] == '\0') {
      std::snprintf(made[i], sizeof made[i], "reft_dim_%u", count.fetch_add(1));
      renamed = true;
      continue;
    }
    // A copy: the setter clears the names that the getter handed out. One too long is left alone, and with it the output's shape.
    if (std::snprintf(made[i], sizeof made[i], "%s", names[i]) >= static_cast<int>(sizeof made[i])) return nullptr;
  }
  const char* given[3] = {made[0], made[1], made[2]};
  if (renamed) {
    if (Status status = SetSymbolicDimensions::call(api, h, given, rank)) return status;
  }
  return SetOutputShapeInfo::call(api, context, 0, h);
}

// y may take the place of h. The two numbers stay ours: there is nothing to release.
size_t may_inplace(int** inputs, int** outputs) {
  static int h = 0, y = 0;
  *inputs = &h;
  *outputs = &y;
  return 1;
}

}  // namespace

Status read_inputs(const Kernel& kernel, const Context* context, const char* names, Tensor* const* inputs, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (Status status = read_input(kernel, context, names, i, inputs[i])) return status;
  }
  return nullptr;
}

Status check_tokens(const Kernel& kernel, const Tensor& h, const Tensor& slot) {
  if (slot.element != kElementInt32) return refused(kernel.api, "%s: slot is %s, expected int32", kernel.op, type_name(slot.element));
  if (h.rank != 2 && h.rank != 3) {
    return refused(kernel.api, "%s: h has shape %s, expected [tokens, D] or [batch, sequence, D]", kernel.op, Shown(h).text);
  }
  bool leading = slot.rank == h.rank - 1;
  for (size_t i = 0; leading && i < slot.rank; ++i) leading = slot.dims[i] == h.dims[i];
  if (leading) return nullptr;
  return refused(kernel.api, "%s: slot has shape %s, expected %s, one slot per token of h %s", kernel.op, Shown(slot).text,
                 Shown(h.dims, h.rank - 1).text, Shown(h).text);
}

Status allocate_output(const Api* api, Context* context, const Tensor& h, Tensor* y) {
  if (Status status = GetOutput::call(api, context, 0, h.dims, h.rank, &y->value)) return status;
  if (Status status = GetTensorMutableData::call(api, y->value, &y->data)) return status;
  statistics.calls.fetch_add(1, std::memory_order_relaxed);
  if (h.data == y->data) statistics.in_place.fetch_add(1, std::memory_order_relaxed);
  return nullptr;
}

int64_t tokens_of(const Tensor& h) {
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < h.rank; ++i) tokens *= h.dims[i];
  return tokens;
}

Op make_op(const Definition& definition, DType dtype, const char* provider) {
  Op op{};
  op.version = kApiVersion;
  op.name = definition.name;
  op.inputs = definition.inputs;
  op.dtype = dtype;
  op.provider = provider;
  op.GetName = [](const CustomOp* self) { return static_cast<const Op*>(self)->name; };
  op.GetExecutionProviderType = [](const CustomOp* self) { return static_cast<const Op*>(self)->provider; };
  // h chooses the kernel. The others are left open, for onnxruntime says of a mismatch only that no kernel matches; the op's own check says which.
  op.GetInputType = [](const CustomOp* self, size_t index) {
    return index == 0 ? static_cast<int>(static_cast<const Op*>(self)->dtype) : 0;
  };
  op.GetInputTypeCount = [](const CustomOp* self) { return static_cast<const Op*>(self)->inputs; };
  op.GetOutputType = [](const CustomOp* self, size_t) { return static_cast<int>(static_cast<const Op*>(self)->dtype); };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t) { return 0; };   // required
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return 0; };  // required
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };       // the provider's own memory
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  op.CreateKernelV2 = definition.create;
  op.KernelComputeV2 = definition.compute;
  op.KernelDestroy = definition.destroy;
  op.InferOutputShape = infer_shape;
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  op.GetMayInplace = may_inplace;
  op.ReleaseMayInplace = [](int*, int*) {};
  // Never an alias: with one declared onnxruntime reuses h's buffer although others still read it, and the results are wrong.
  op.GetAliasMap = [](int**, int**) -> size_t { return 0; };
  op.ReleaseAliasMap = [](int*, int*) {};
  return op;
}

}  // namespace reft::ort
