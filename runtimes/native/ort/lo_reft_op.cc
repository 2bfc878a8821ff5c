// ai.reft::LoReFT for ONNX Runtime: checks what comes in, forwards to the kernels, computes nothing itself.
//
// Every status is looked at. An error names the op, what came and what was expected; onnxruntime adds the node's name.

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

#include "c_api/reft.h"
#include "cpu/edit_cpu.h"
#include "cuda/edit_cuda.h"
#include "ort/ort_abi.h"
#include "ort/statistics.h"
#include "reft/edit.h"

namespace reft::ort {
namespace {

constexpr size_t kShownDimensions = 8;
// About ten microseconds of one thread's work: less does not pay for waking another.
constexpr int64_t kWorthSharing = 1 << 18;

struct Op : CustomOp {
  DType dtype;
  const char* provider;  // null: the CPU
};

struct Kernel {
  const Api* api;
  DType dtype;
  Activation activation;
  bool first_half;
};

struct Library {
  const Api* api = nullptr;
  uint32_t release = 0;  // the minor version of the onnxruntime that loaded us
};
Library library;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
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
  explicit Shown(const int64_t* dims, size_t rank) {
    size_t used = static_cast<size_t>(std::snprintf(text, sizeof text, "["));
    for (size_t i = 0; i < rank && i < kShownDimensions; ++i) {
      used += static_cast<size_t>(std::snprintf(text + used, sizeof text - used, "%s%lld", i ? ", " : "", static_cast<long long>(dims[i])));
    }
    std::snprintf(text + used, sizeof text - used, rank > kShownDimensions ? ", ...]" : "]");
  }
  explicit Shown(const Tensor& tensor) : Shown(tensor.dims, tensor.rank) {}
};

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

Status read_input(const Api* api, const Context* context, size_t index, Tensor* tensor) {
  const Value* value = nullptr;
  if (Status status = GetInput::call(api, context, index, &value)) return status;
  if (value == nullptr) return refused(api, "LoReFT: input %d is missing, expected h, slot, U, A and b", static_cast<int>(index));
  tensor->value = const_cast<Value*>(value);
  if (Status status = GetTensorMutableData::call(api, tensor->value, &tensor->data)) return status;
  if (library.release < kShapeReferenceVersion) return read_shape_copy(api, tensor);
  return GetTypeAndShapeReference::call(api, value, &tensor->element, &tensor->dims, &tensor->rank);
}

// h [.., D], slot [..], U and A [N, r, D], b [N, r]; null when they fit.
Status check(const Api* api, const Kernel& kernel, const Tensor& h, const Tensor& slot, const Tensor& U, const Tensor& A, const Tensor& b) {
  const int element = static_cast<int>(kernel.dtype);
  if (slot.element != kElementInt32) return refused(api, "LoReFT: slot is %s, expected int32", type_name(slot.element));
  if (h.element != element || U.element != element || A.element != element || b.element != element) {
    return refused(api, "LoReFT: h, U, A and b are %s, %s, %s and %s, expected %s", type_name(h.element), type_name(U.element),
                   type_name(A.element), type_name(b.element), type_name(element));
  }
  if (h.rank != 2 && h.rank != 3) return refused(api, "LoReFT: h has shape %s, expected [tokens, D] or [batch, sequence, D]", Shown(h).text);
  bool leading = slot.rank == h.rank - 1;
  for (size_t i = 0; leading && i < slot.rank; ++i) leading = slot.dims[i] == h.dims[i];
  if (!leading) {
    return refused(api, "LoReFT: slot has shape %s, expected %s, one slot per token of h %s", Shown(slot).text,
                   Shown(h.dims, h.rank - 1).text, Shown(h).text);
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
Status read_edit(const Kernel& kernel, Context* context, Edit* edit) {
  const Api* api = kernel.api;
  Tensor h, slot, U, A, b, y;
  Tensor* inputs[5] = {&h, &slot, &U, &A, &b};
  for (size_t i = 0; i < 5; ++i) {
    if (Status status = read_input(api, context, i, inputs[i])) return status;
  }
  if (Status status = check(api, kernel, h, slot, U, A, b)) return status;
  if (Status status = GetOutput::call(api, context, 0, h.dims, h.rank, &y.value)) return status;
  if (Status status = GetTensorMutableData::call(api, y.value, &y.data)) return status;
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < h.rank; ++i) tokens *= h.dims[i];
  *edit = {kernel.dtype, kernel.activation, kernel.first_half, h.data,    y.data,    static_cast<const int32_t*>(slot.data),
           U.data,       A.data,            b.data,            tokens,    U.dims[0], U.dims[1],
           h.dims[h.rank - 1]};
  statistics.calls.fetch_add(1, std::memory_order_relaxed);
  if (h.data == y.data) statistics.in_place.fetch_add(1, std::memory_order_relaxed);
  return nullptr;
}

struct Shares {
  const Edit* edit;
  int64_t tokens;  // of one share

  static void run(void* shares, size_t index) {
    const Shares& self = *static_cast<Shares*>(shares);
    const int64_t begin = static_cast<int64_t>(index) * self.tokens;
    const int64_t end = begin + self.tokens < self.edit->tokens ? begin + self.tokens : self.edit->tokens;
    edit_tokens(*self.edit, begin, end, **usable_row_kernels());
  }
};

Status compute_on_cpu(void* state, Context* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  Edit edit;
  if (Status status = read_edit(kernel, context, &edit)) return status;
  const int64_t edited = count_edited(edit);
  if (edited == 0 && edit.h == edit.y) return nullptr;
  statistics.edited_rows.fetch_add(edited, std::memory_order_relaxed);
  const int64_t copied = edit.h == edit.y ? 0 : edit.tokens - edited;
  // Copying a row costs about as much as one rank of editing it.
  if ((edited * (edit.rank + 1) + copied) * edit.width < kWorthSharing) {
    edit_tokens(edit, 0, edit.tokens, **usable_row_kernels());
    return nullptr;
  }
  // Small shares, since edited tokens often stand together; whole blocks, since a bank is read once per block.
  Shares shares{&edit, kRows};
  statistics.threaded.fetch_add(1, std::memory_order_relaxed);
  const size_t count = static_cast<size_t>((edit.tokens + shares.tokens - 1) / shares.tokens);
  return ParallelFor::call(kernel.api, context, &Shares::run, count, 0, &shares);
}

#ifdef REFT_CUDA
Status compute_on_cuda(void* state, Context* context) {
  const Kernel& kernel = *static_cast<Kernel*>(state);
  Edit edit;
  if (Status status = read_edit(kernel, context, &edit)) return status;
  void* stream = nullptr;
  if (Status status = GetComputeStream::call(kernel.api, context, &stream)) return status;
  const char* error = launch_edit(edit, stream);
  return error == nullptr ? nullptr : refused(kernel.api, "LoReFT: CUDA launch failed: %s", error);
}
#endif

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

Status create_kernel(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) {
  char activation[64], activated[64];
  if (Status status = read_attribute(api, info, "activation", "", activation, sizeof activation)) return status;
  if (Status status = read_attribute(api, info, "activated", "all", activated, sizeof activated)) return status;
  Kernel kernel{api, static_cast<const Op*>(op)->dtype, Activation::kNone, false};
  if (!parse_activation(activation, &kernel.activation)) {
    return refused(api, "LoReFT: attribute activation is '%s', expected one of %s", activation, kActivationNames);
  }
  if (!parse_activated(activated, &kernel.first_half)) {
    return refused(api, "LoReFT: attribute activated is '%s', expected all or first_half", activated);
  }
  *out = new (std::nothrow) Kernel(kernel);
  return *out != nullptr ? nullptr : CreateStatus::call(api, kFail, "LoReFT: out of memory");
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

Op make_op(uint32_t version, DType dtype, const char* provider) {
  Op op{};
  op.version = version;
  op.dtype = dtype;
  op.provider = provider;
  op.GetName = [](const CustomOp*) { return "LoReFT"; };
  op.GetExecutionProviderType = [](const CustomOp* self) { return static_cast<const Op*>(self)->provider; };
  // h chooses the kernel. The others are left open, for onnxruntime says of a mismatch only that no kernel matches; check() says which.
  op.GetInputType = [](const CustomOp* self, size_t index) {
    return index == 0 ? static_cast<int>(static_cast<const Op*>(self)->dtype) : 0;
  };
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return 5; };
  op.GetOutputType = [](const CustomOp* self, size_t) { return static_cast<int>(static_cast<const Op*>(self)->dtype); };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const CustomOp*, size_t) { return 0; };   // required
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return 0; };  // required
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };       // the provider's own memory
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute_on_cpu;
#ifdef REFT_CUDA
  if (provider != nullptr) op.KernelComputeV2 = compute_on_cuda;
#endif
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

// The domain and its ops, made once per process: sessions borrow them for as long as they live.
Status domain_of(const Api* api, Domain** out) {
  static std::mutex mutex;
  static Domain* domain = nullptr;
  static Op ops[6];
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    Domain* made = nullptr;
    if (Status status = CreateCustomOpDomain::call(api, "ai.reft", &made)) return status;
    int count = 0;
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      ops[count++] = make_op(kApiVersion, dtype, nullptr);
#ifdef REFT_CUDA
      ops[count++] = make_op(kApiVersion, dtype, "CUDAExecutionProvider");
#endif
    }
    for (int i = 0; i < count; ++i) {
      if (Status status = CustomOpDomainAdd::call(api, made, &ops[i])) return status;
    }
    domain = made;
  }
  *out = domain;
  return nullptr;
}

}  // namespace
}  // namespace reft::ort

// onnxruntime calls this by name when the library is registered on session options.
REFT_EXPORT reft::ort::Status RegisterCustomOps(reft::ort::SessionOptions* options, const reft::ort::ApiBase* base) {
  using namespace reft::ort;
  int major = 0, minor = 0;
  const bool parsed = std::sscanf(base->GetVersionString(), "%d.%d", &major, &minor) == 2;
  if (!parsed || major < 1 || (major == 1 && minor < static_cast<int>(kApiVersion))) {
    // Every release knows version 1 of the API, whose first function makes an error.
    char text[128];
    std::snprintf(text, sizeof text, "LoReFT: onnxruntime %.32s is too old, expected 1.%u or later", base->GetVersionString(), kApiVersion);
    return CreateStatus::call(base->GetApi(1), kNotImplemented, text);
  }
  const Api* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return CreateStatus::call(base->GetApi(1), kNotImplemented, "LoReFT: this onnxruntime does not offer version 18 of its C API");
  }
  library = {api, major > 1 ? kShapeReferenceVersion : static_cast<uint32_t>(minor)};
  Domain* domain = nullptr;
  if (Status status = domain_of(api, &domain)) return status;
  return AddCustomOpDomain::call(api, options, domain);
}
