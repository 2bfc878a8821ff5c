// ai.reft::LoReFT for TensorRT: checks what comes in, forwards to the CUDA launcher, computes nothing itself.
//
// Written to the API of TensorRT 10.3; 10.13, 11 and TensorRT-RTX have the same plugin interfaces. What does not fit is refused while the
// engine is built, with a reason in TensorRT's log: element types where the node joins the network, shapes there and again for every
// profile, and once more when a context sets its shapes.

#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "cuda/edit_cuda.h"
#include "reft/edit.h"
#include "tensorrt/edit_shapes.h"
#include "tensorrt/host_log.h"
#include "tensorrt/reft_trt.h"

#define REFT_TEXT(x) #x
#define REFT_TEXT_OF(x) REFT_TEXT(x)

static_assert(NV_TENSORRT_MAJOR == 1 || NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1003,
              "LoReFT needs the headers of TensorRT 10.3 or later, or of TensorRT-RTX");

namespace reft::trt {
namespace {

using nvinfer1::AsciiChar;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr const char* kName = "LoReFT";
constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "ai.reft";
constexpr const char* kExpectedInputs = "h, slot, U, A and b";

const char* type_name(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "float32";
    case nvinfer1::DataType::kHALF:
      return "float16";
    case nvinfer1::DataType::kBF16:
      return "bfloat16";
    case nvinfer1::DataType::kINT32:
      return "int32";
    case nvinfer1::DataType::kINT64:
      return "int64";
    case nvinfer1::DataType::kINT8:
      return "int8";
    case nvinfer1::DataType::kBOOL:
      return "bool";
    case nvinfer1::DataType::kFP8:
      return "float8";
    default:
      return "another type";
  }
}

bool parse_type(nvinfer1::DataType type, DType* dtype) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      *dtype = DType::kFloat32;
      return true;
    case nvinfer1::DataType::kHALF:
      *dtype = DType::kFloat16;
      return true;
    case nvinfer1::DataType::kBF16:
      *dtype = DType::kBFloat16;
      return true;
    default:
      return false;
  }
}

Shape shape_of(const nvinfer1::Dims& dims) {
  Shape shape;
  shape.rank = dims.nbDims;
  for (int i = 0; i < dims.nbDims && i < kMaxDims; ++i) shape.dims[i] = {dims.d[i], dims.d[i]};
  return shape;
}

Shape shape_of(const nvinfer1::DimsExprs& dims) {
  Shape shape;
  shape.rank = dims.nbDims;
  for (int i = 0; i < dims.nbDims && i < kMaxDims; ++i) {
    if (dims.d[i]->isConstant()) shape.dims[i] = {dims.d[i]->getConstantValue(), dims.d[i]->getConstantValue()};
  }
  return shape;
}

// Within a profile.
Shape shape_of(const DynamicPluginTensorDesc& tensor) {
  Shape shape;
  shape.rank = tensor.desc.dims.nbDims;
  for (int i = 0; i < shape.rank && i < kMaxDims; ++i) shape.dims[i] = {tensor.min.d[i], tensor.max.d[i]};
  return shape;
}

Shape shape_of(const PluginTensorDesc& tensor) { return shape_of(tensor.dims); }

// The node's attributes, as text and as the launcher takes them.
struct Attributes {
  char activation[16] = "";
  char activated[16] = "all";
  Activation act = Activation::kNone;
  bool first_half = false;
};

// The field's text; false, with the reason logged, where it is not a short string. Whether its length counts a final NUL is the host's
// choice: the parser counts none, our own fields do.
bool read_text(const char* node, const PluginField& field, char (&text)[16]) {
  size_t length = field.length > 0 ? static_cast<size_t>(field.length) : 0;
  const char* data = static_cast<const char*>(field.data);
  if (field.type != PluginFieldType::kCHAR || (length > 0 && data == nullptr)) {
    log_error(node, "attribute %s is of plugin field type %d, expected a string", field.name, static_cast<int>(field.type));
    return false;
  }
  while (length > 0 && data[length - 1] == '\0') --length;
  if (length >= sizeof text) {
    log_error(node, "attribute %s has %d characters, expected a short name", field.name, static_cast<int>(length));
    return false;
  }
  if (length > 0) std::memcpy(text, data, length);
  text[length] = '\0';
  return true;
}

// Absent fields keep their defaults.
bool read_attributes(const char* node, const PluginFieldCollection* fields, Attributes* attributes) {
  for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    if (std::strcmp(field.name, "activation") == 0) {
      if (!read_text(node, field, attributes->activation)) return false;
    } else if (std::strcmp(field.name, "activated") == 0) {
      if (!read_text(node, field, attributes->activated)) return false;
    }
  }
  if (!parse_activation(attributes->activation, &attributes->act)) {
    log_error(node, "attribute activation is '%s', expected one of %s", attributes->activation, kActivationNames);
    return false;
  }
  if (!parse_activated(attributes->activated, &attributes->first_half)) {
    log_error(node, "attribute activated is '%s', expected all or first_half", attributes->activated);
    return false;
  }
  return true;
}

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const char* node, const Attributes& attributes) : attributes_(attributes) {
    std::snprintf(node_, sizeof node_, "%s", node != nullptr ? node : "");
    // With their final NUL: a field of length 0 would be the identity's.
    fields_[0] = {"activation", attributes_.activation, PluginFieldType::kCHAR, length_of(attributes_.activation)};
    fields_[1] = {"activated", attributes_.activated, PluginFieldType::kCHAR, length_of(attributes_.activated)};
  }
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(node_, attributes_); }

  const AsciiChar* getPluginName() const noexcept override { return kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override {
    if (!has_arity(input_count, output_count)) return -1;
    const auto h = inputs[kH];
    DType dtype;
    if (!parse_type(h, &dtype)) {
      log_error(node_, "h is %s, expected float32, float16 or bfloat16", type_name(h));
      return -1;
    }
    if (inputs[kSlot] != nvinfer1::DataType::kINT32) {
      log_error(node_, "slot is %s, expected int32", type_name(inputs[kSlot]));
      return -1;
    }
    if (inputs[kU] != h || inputs[kA] != h || inputs[kB] != h) {
      log_error(node_, "h, U, A and b are %s, %s, %s and %s, expected one type for all", type_name(h), type_name(inputs[kU]),
                type_name(inputs[kA]), type_name(inputs[kB]));
      return -1;
    }
    outputs[0] = h;
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder&) noexcept override {
    if (!has_arity(input_count, output_count) || !has_shapes(inputs)) return -1;
    outputs[0] = inputs[kH];
    return 0;
  }

  // Asked for many combinations, of which most are refused in the course of any build: nothing is logged here.
  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                 int32_t output_count) noexcept override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (input_count != kInputs || output_count != 1 || tensor.format != nvinfer1::PluginFormat::kLINEAR) return false;
    DType dtype;
    if (position == kSlot) return tensor.type == nvinfer1::DataType::kINT32;
    return position == kH ? parse_type(tensor.type, &dtype) : tensor.type == tensors[kH].desc.type;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
                          int32_t output_count) noexcept override {
    return has_arity(input_count, output_count) && has_shapes(inputs) ? 0 : -1;
  }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                        int32_t output_count) noexcept override {
    return has_arity(input_count, output_count) && has_shapes(inputs) ? 0 : -1;
  }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* data, void* const* outputs, void*,
                  cudaStream_t stream) noexcept override {
    DType dtype;
    // Checked when the shapes were set; once more, since the kernel trusts them.
    if (!has_shapes(inputs) || !parse_type(inputs[kH].type, &dtype)) return -1;
    const nvinfer1::Dims &h = inputs[kH].dims, &U = inputs[kU].dims;
    int64_t tokens = 1;
    for (int i = 0; i + 1 < h.nbDims; ++i) tokens *= h.d[i];
    const Edit edit{dtype,   attributes_.act, attributes_.first_half, data[kH], outputs[0], static_cast<const int32_t*>(data[kSlot]),
                    data[kU], data[kA],       data[kB],               tokens,   U.d[0],     U.d[1],
                    h.d[h.nbDims - 1]};
    if (const char* error = launch_edit(edit, stream)) {
      log_error(node_, "CUDA launch failed: %s; the plugin was compiled for sm %s", error, reft_trt_cuda_architectures());
      return -1;
    }
    return 0;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  static int32_t length_of(const char* text) { return static_cast<int32_t>(std::strlen(text)) + 1; }

  bool has_arity(int32_t inputs, int32_t outputs) const {
    if (inputs == kInputs && outputs == 1) return true;
    log_error(node_, "the node has %d inputs and %d outputs, expected %s and one output", inputs, outputs, kExpectedInputs);
    return false;
  }

  template <class Described>
  bool has_shapes(const Described* inputs) const {
    const Shape shapes[kInputs] = {shape_of(inputs[kH]), shape_of(inputs[kSlot]), shape_of(inputs[kU]), shape_of(inputs[kA]),
                                   shape_of(inputs[kB])};
    char reason[512];
    if (fits(shapes, reason, sizeof reason)) return true;
    log_error(node_, "%s", reason);
    return false;
  }

  char node_[128];
  const Attributes attributes_;
  PluginField fields_[2];
  const PluginFieldCollection collection_{2, fields_};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const AsciiChar* node, const PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept override {
    Attributes attributes;
    if (!read_attributes(node != nullptr ? node : "", fields, &attributes)) return nullptr;
    return new (std::nothrow) Plugin(node, attributes);
  }
  // The parser hands over the attributes named here, and no others.
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const AsciiChar* getPluginName() const noexcept override { return kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const PluginField fields_[2] = {{"activation", nullptr, PluginFieldType::kCHAR, 1}, {"activated", nullptr, PluginFieldType::kCHAR, 1}};
  const PluginFieldCollection collection_{2, fields_};
};

}  // namespace
}  // namespace reft::trt

const char* reft_trt_version() {
  return "LoReFT 1, TensorRT " REFT_TEXT_OF(NV_TENSORRT_MAJOR) "." REFT_TEXT_OF(NV_TENSORRT_MINOR) "." REFT_TEXT_OF(NV_TENSORRT_PATCH);
}

const char* reft_trt_cuda_architectures() { return REFT_CUDA_ARCHITECTURES; }

nvinfer1::IPluginCreatorInterface* const* reft_trt_creators(int32_t* count) {
  // Never destroyed: TensorRT's registry may ask for its name while the process ends.
  static nvinfer1::IPluginCreatorInterface* const creators[] = {new (std::nothrow) reft::trt::Creator};
  *count = creators[0] != nullptr ? 1 : 0;
  return creators;
}

void reft_trt_use_logger(nvinfer1::ILogger* (*get_logger)() noexcept, int32_t version) {
  reft::trt::use_global_logger(get_logger, version);
}

// TensorRT calls these two by name when it loads the library: IPluginRegistry::loadLibrary, trtexec --dynamicPlugins.
REFT_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) { return reft_trt_creators(&count); }

REFT_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { reft::trt::use_logger_finder(finder); }
