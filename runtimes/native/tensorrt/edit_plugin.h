// What the plugins of this library share: inputs h [.., D] and slot [..] with banks behind them, one output of the shape and type of h.
//
// Written to the API of TensorRT 10.3; 10.13, 11 and TensorRT-RTX have the same plugin interfaces. What does not fit is refused while the
// engine is built, with a reason in TensorRT's log: element types where the node joins the network, shapes there and again for every
// profile, and once more when a context sets its shapes.
#pragma once

#include <NvInferRuntime.h>

#include "reft/edit.h"
#include "tensorrt/edit_shapes.h"

static_assert(NV_TENSORRT_MAJOR == 1 || NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1003,
              "the plugins need the headers of TensorRT 10.3 or later, or of TensorRT-RTX");

namespace reft::trt {

constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "ai.reft";

constexpr int32_t kMostInputs = 5;

struct Contract {
  const char* name;
  const char* inputs[kMostInputs];  // their names; all but slot are of the type of h
  int32_t count;
  bool (*fits)(const Shape* inputs, char* reason, size_t capacity);
};

// A derived class stores the attributes, and hands an edit to the launcher.
class EditPlugin : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  EditPlugin(const Contract& contract, const char* node);
  EditPlugin(const EditPlugin&) = delete;
  EditPlugin& operator=(const EditPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;

  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return contract_.name; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs* shape_inputs,
                          int32_t shape_input_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t input_count,
                                 int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count, const nvinfer1::PluginTensorDesc* outputs,
                        int32_t output_count) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

 protected:
  const char* node() const { return node_; }

  // False, with the reason logged, where the kernel could not trust what it is given; what passes was checked when the shapes were set.
  bool ready(const nvinfer1::PluginTensorDesc* inputs, DType* dtype) const;

  // What enqueue returns for the launcher's answer, which is logged where it is an error.
  int32_t launched(const char* error) const;

 private:
  bool has_arity(int32_t inputs, int32_t outputs) const;
  template <class Described>
  bool has_shapes(const Described* inputs) const;

  const Contract& contract_;
  char node_[128];
};

class EditCreator : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit EditCreator(const Contract& contract) : contract_(contract) {}
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return contract_.name; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Contract& contract_;
};

// False for a type that the ops do not compute in.
bool parse_type(nvinfer1::DataType type, DType* dtype);

// The tokens of h.
int64_t tokens_of(const nvinfer1::Dims& h);

// Never destroyed: TensorRT's registry may ask for a creator's name while the process ends. Null without memory.
nvinfer1::IPluginCreatorInterface* lo_reft_creator();
nvinfer1::IPluginCreatorInterface* red_creator();

}  // namespace reft::trt
