// ai.reft::LoReFT for TensorRT: checks what comes in, forwards to the CUDA launcher, computes nothing itself.

#include <cstdio>
#include <cstring>
#include <new>

#include "cuda/edit_cuda.h"
#include "tensorrt/edit_plugin.h"
#include "tensorrt/host_log.h"

namespace reft::trt {
namespace {

using nvinfer1::AsciiChar;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr Contract kContract{"LoReFT", {"h", "slot", "U", "A", "b"}, kInputs, lo_reft_fits};

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
    log_error(kContract.name, node, "attribute %s is of plugin field type %d, expected a string", field.name, static_cast<int>(field.type));
    return false;
  }
  while (length > 0 && data[length - 1] == '\0') --length;
  if (length >= sizeof text) {
    log_error(kContract.name, node, "attribute %s has %d characters, expected a short name", field.name, static_cast<int>(length));
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
    log_error(kContract.name, node, "attribute activation is '%s', expected one of %s", attributes->activation, kActivationNames);
    return false;
  }
  if (!parse_activated(attributes->activated, &attributes->first_half)) {
    log_error(kContract.name, node, "attribute activated is '%s', expected all or first_half", attributes->activated);
    return false;
  }
  return true;
}

class Plugin final : public EditPlugin {
 public:
  Plugin(const char* node, const Attributes& attributes) : EditPlugin(kContract, node), attributes_(attributes) {
    // With their final NUL: a field of length 0 would be the identity's.
    fields_[0] = {"activation", attributes_.activation, PluginFieldType::kCHAR, length_of(attributes_.activation)};
    fields_[1] = {"activated", attributes_.activated, PluginFieldType::kCHAR, length_of(attributes_.activated)};
  }

  nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(node(), attributes_); }

  // For the largest shapes of the profile.
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    return static_cast<size_t>(most_workspace_bytes(tokens_of(inputs[kH].max), inputs[kU].max.d[1]));
  }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* data, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    DType dtype;
    if (!ready(inputs, &dtype)) return -1;
    const nvinfer1::Dims &h = inputs[kH].dims, &U = inputs[kU].dims;
    const Edit edit{dtype,    attributes_.act, attributes_.first_half, data[kH],     outputs[0], static_cast<const int32_t*>(data[kSlot]),
                    data[kU], data[kA],        data[kB],               tokens_of(h), U.d[0],     U.d[1],
                    h.d[h.nbDims - 1]};
    return launched(launch_edit(edit, stream, workspace));
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  static int32_t length_of(const char* text) { return static_cast<int32_t>(std::strlen(text)) + 1; }

  const Attributes attributes_;
  PluginField fields_[2];
  const PluginFieldCollection collection_{2, fields_};
};

class Creator final : public EditCreator {
 public:
  Creator() : EditCreator(kContract) {}
  nvinfer1::IPluginV3* createPlugin(const AsciiChar* node, const PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept override {
    Attributes attributes;
    if (!read_attributes(node != nullptr ? node : "", fields, &attributes)) return nullptr;
    return new (std::nothrow) Plugin(node, attributes);
  }
  // The parser hands over the attributes named here, and no others.
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

 private:
  const PluginField fields_[2] = {{"activation", nullptr, PluginFieldType::kCHAR, 1}, {"activated", nullptr, PluginFieldType::kCHAR, 1}};
  const PluginFieldCollection collection_{2, fields_};
};

}  // namespace

nvinfer1::IPluginCreatorInterface* lo_reft_creator() { return new (std::nothrow) Creator; }

}  // namespace reft::trt
