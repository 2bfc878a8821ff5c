#include "tensorrt/edit_plugin.h"

#include <cstdio>

#include "tensorrt/host_log.h"
#include "tensorrt/reft_trt.h"

namespace reft::trt {
namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

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

// "h, U, A and b"
struct Listed {
  char text[200] = "";
  template <class TextOf>
  Listed(int32_t count, bool with_slot, TextOf text_of) {
    size_t used = 0;
    for (int32_t i = 0; i < count; ++i) {
      if (i == kSlot && !with_slot) continue;
      const char* between = i == 0 ? "" : i + 1 < count ? ", " : " and ";
      used += static_cast<size_t>(std::snprintf(text + used, sizeof text - used, "%s%s", between, text_of(i)));
    }
  }
};

}  // namespace

EditPlugin::EditPlugin(const Contract& contract, const char* node) : contract_(contract) {
  std::snprintf(node_, sizeof node_, "%s", node != nullptr ? node : "");
}

nvinfer1::IPluginCapability* EditPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
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

int32_t EditPlugin::getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                                       int32_t input_count) const noexcept {
  if (!has_arity(input_count, output_count)) return -1;
  const auto h = inputs[kH];
  DType dtype;
  if (!parse_type(h, &dtype)) {
    log_error(contract_.name, node_, "h is %s, expected float32, float16 or bfloat16", type_name(h));
    return -1;
  }
  if (inputs[kSlot] != nvinfer1::DataType::kINT32) {
    log_error(contract_.name, node_, "slot is %s, expected int32", type_name(inputs[kSlot]));
    return -1;
  }
  for (int32_t i = kSlot + 1; i < contract_.count; ++i) {
    if (inputs[i] == h) continue;
    const Listed names(contract_.count, false, [&](int32_t k) { return contract_.inputs[k]; });
    const Listed found(contract_.count, false, [&](int32_t k) { return type_name(inputs[k]); });
    log_error(contract_.name, node_, "%s are %s, expected one type for all", names.text, found.text);
    return -1;
  }
  outputs[0] = h;
  return 0;
}

int32_t EditPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
                                    nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  if (!has_arity(input_count, output_count) || !has_shapes(inputs)) return -1;
  outputs[0] = inputs[kH];
  return 0;
}

// Asked for many combinations, of which most are refused in the course of any build: nothing is logged here.
bool EditPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                           int32_t output_count) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (input_count != contract_.count || output_count != 1 || tensor.format != nvinfer1::PluginFormat::kLINEAR) return false;
  DType dtype;
  if (position == kSlot) return tensor.type == nvinfer1::DataType::kINT32;
  return position == kH ? parse_type(tensor.type, &dtype) : tensor.type == tensors[kH].desc.type;
}

int32_t EditPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
                                    int32_t output_count) noexcept {
  return has_arity(input_count, output_count) && has_shapes(inputs) ? 0 : -1;
}

int32_t EditPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                                  int32_t output_count) noexcept {
  return has_arity(input_count, output_count) && has_shapes(inputs) ? 0 : -1;
}

bool EditPlugin::ready(const PluginTensorDesc* inputs, DType* dtype) const {
  return has_shapes(inputs) && parse_type(inputs[kH].type, dtype);
}

int32_t EditPlugin::launched(const char* error) const {
  if (error == nullptr) return 0;
  log_error(contract_.name, node_, "CUDA launch failed: %s; the plugin was compiled for sm %s", error, reft_trt_cuda_architectures());
  return -1;
}

bool EditPlugin::has_arity(int32_t inputs, int32_t outputs) const {
  if (inputs == contract_.count && outputs == 1) return true;
  const Listed names(contract_.count, true, [&](int32_t k) { return contract_.inputs[k]; });
  log_error(contract_.name, node_, "the node has %d inputs and %d outputs, expected %s and one output", inputs, outputs, names.text);
  return false;
}

template <class Described>
bool EditPlugin::has_shapes(const Described* inputs) const {
  Shape shapes[kMostInputs];
  for (int32_t i = 0; i < contract_.count; ++i) shapes[i] = shape_of(inputs[i]);
  char reason[512];
  if (contract_.fits(shapes, reason, sizeof reason)) return true;
  log_error(contract_.name, node_, "%s", reason);
  return false;
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

int64_t tokens_of(const nvinfer1::Dims& h) {
  int64_t tokens = 1;
  for (int i = 0; i + 1 < h.nbDims; ++i) tokens *= h.d[i];
  return tokens;
}

}  // namespace reft::trt
