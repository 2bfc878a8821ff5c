// ai.reft::RED for TensorRT: checks what comes in, forwards to the CUDA launcher, computes nothing itself.

#include <new>

#include "cuda/edit_cuda.h"
#include "tensorrt/edit_plugin.h"

namespace reft::trt {
namespace {

using nvinfer1::AsciiChar;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

constexpr Contract kContract{"RED", {"h", "slot", "scale", "bias"}, kRedInputs, red_fits};
// The op has no attributes: none are read, none are stored.
constexpr PluginFieldCollection kNoFields{0, nullptr};

class Plugin final : public EditPlugin {
 public:
  explicit Plugin(const char* node) : EditPlugin(kContract, node) {}

  nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(node()); }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* data, void* const* outputs, void*,
                  cudaStream_t stream) noexcept override {
    DType dtype;
    if (!ready(inputs, &dtype)) return -1;
    const nvinfer1::Dims& h = inputs[kH].dims;
    const RedEdit edit{dtype,       data[kH],     outputs[0],                static_cast<const int32_t*>(data[kSlot]), data[kScale],
                       data[kBias], tokens_of(h), inputs[kScale].dims.d[0], h.d[h.nbDims - 1]};
    return launched(launch_edit(edit, stream));
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &kNoFields; }
};

class Creator final : public EditCreator {
 public:
  Creator() : EditCreator(kContract) {}
  nvinfer1::IPluginV3* createPlugin(const AsciiChar* node, const PluginFieldCollection*, nvinfer1::TensorRTPhase) noexcept override {
    return new (std::nothrow) Plugin(node);
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &kNoFields; }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* red_creator() { return new (std::nothrow) Creator; }

}  // namespace reft::trt
