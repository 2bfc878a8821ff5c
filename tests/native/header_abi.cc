// Everything of TensorRT's headers that the plugin, its registration and its tests touch, one line each: the slot of a virtual function, the
// place of a member, the value of an enumerator. test_tensorrt_headers.py compares what two sets of headers say.
#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdio>
#include <cstring>

using namespace nvinfer1;

namespace {

void show(const char* name, long long value) { std::printf("%s %lld\n", name, value); }

// A pointer to a virtual member function is one more than the place of its slot in the table (the Itanium C++ ABI, on x86-64; on AArch64
// the one is kept in the second word).
template <class Function>
long long slot_of(Function function) {
  ptrdiff_t words[2];
  static_assert(sizeof function == sizeof words, "a pointer to a member function has two words");
  std::memcpy(words, &function, sizeof words);
  return words[0] / static_cast<ptrdiff_t>(sizeof(void*));
}

struct Peek : IDimensionExpr {
  static long long place() {
    const auto member = &Peek::mImpl;
    ptrdiff_t offset;
    std::memcpy(&offset, &member, sizeof offset);
    return offset;
  }
};

using RegisterCreator = bool (IPluginRegistry::*)(IPluginCreatorInterface&, const AsciiChar*) noexcept;

}  // namespace

#define SHOW(x) show(#x, static_cast<long long>(x))
#define SLOT(x) show(#x, slot_of(&x))

int main() {
  SLOT(IVersionedInterface::getAPILanguage);
  SLOT(IVersionedInterface::getInterfaceInfo);
  SLOT(IPluginV3::getCapabilityInterface);
  SLOT(IPluginV3::clone);
  SLOT(IPluginV3OneCore::getPluginName);
  SLOT(IPluginV3OneCore::getPluginVersion);
  SLOT(IPluginV3OneCore::getPluginNamespace);
  SLOT(IPluginV3OneBuild::configurePlugin);
  SLOT(IPluginV3OneBuild::getOutputDataTypes);
  SLOT(IPluginV3OneBuild::getOutputShapes);
  SLOT(IPluginV3OneBuild::supportsFormatCombination);
  SLOT(IPluginV3OneBuild::getNbOutputs);
  SLOT(IPluginV3OneBuild::getWorkspaceSize);
  SLOT(IPluginV3OneBuild::getValidTactics);
  SLOT(IPluginV3OneBuild::getNbTactics);
  SLOT(IPluginV3OneBuild::getTimingCacheID);
  SLOT(IPluginV3OneBuild::getFormatCombinationLimit);
  SLOT(IPluginV3OneBuild::getMetadataString);
  SLOT(IPluginV3OneRuntime::setTactic);
  SLOT(IPluginV3OneRuntime::onShapeChange);
  SLOT(IPluginV3OneRuntime::enqueue);
  SLOT(IPluginV3OneRuntime::attachToContext);
  SLOT(IPluginV3OneRuntime::getFieldsToSerialize);
  SLOT(IPluginCreatorV3One::createPlugin);
  SLOT(IPluginCreatorV3One::getFieldNames);
  SLOT(IPluginCreatorV3One::getPluginName);
  SLOT(IPluginCreatorV3One::getPluginVersion);
  SLOT(IPluginCreatorV3One::getPluginNamespace);
  SLOT(apiv::VDimensionExpr::isConstant);
  SLOT(apiv::VDimensionExpr::getConstantValue);
  show("IDimensionExpr::mImpl", Peek::place());
  SLOT(ILogger::log);
  SLOT(ILoggerFinder::findLogger);
  show("IPluginRegistry::registerCreator", slot_of(static_cast<RegisterCreator>(&IPluginRegistry::registerCreator)));
  SLOT(IPluginRegistry::loadLibrary);
  SLOT(IPluginRegistry::deregisterLibrary);
  SLOT(IPluginRegistry::getCreator);

  SHOW(DataType::kFLOAT);
  SHOW(DataType::kHALF);
  SHOW(DataType::kINT8);
  SHOW(DataType::kINT32);
  SHOW(DataType::kBOOL);
  SHOW(DataType::kFP8);
  SHOW(DataType::kBF16);
  SHOW(DataType::kINT64);
  SHOW(TensorFormat::kLINEAR);
  SHOW(TensorFormat::kCHW2);
  SHOW(PluginCapabilityType::kCORE);
  SHOW(PluginCapabilityType::kBUILD);
  SHOW(PluginCapabilityType::kRUNTIME);
  SHOW(TensorRTPhase::kBUILD);
  SHOW(TensorRTPhase::kRUNTIME);
  SHOW(PluginFieldType::kINT32);
  SHOW(PluginFieldType::kCHAR);
  SHOW(ILogger::Severity::kERROR);

  SHOW(Dims::MAX_DIMS);
  SHOW(sizeof(Dims));
  SHOW(offsetof(Dims, nbDims));
  SHOW(offsetof(Dims, d));
  SHOW(sizeof(DimsExprs));
  SHOW(offsetof(DimsExprs, nbDims));
  SHOW(offsetof(DimsExprs, d));
  SHOW(sizeof(PluginTensorDesc));
  SHOW(offsetof(PluginTensorDesc, dims));
  SHOW(offsetof(PluginTensorDesc, type));
  SHOW(offsetof(PluginTensorDesc, format));
  SHOW(sizeof(DynamicPluginTensorDesc));
  SHOW(offsetof(DynamicPluginTensorDesc, desc));
  SHOW(offsetof(DynamicPluginTensorDesc, min));
  SHOW(offsetof(DynamicPluginTensorDesc, max));
  SHOW(sizeof(PluginField));
  SHOW(offsetof(PluginField, name));
  SHOW(offsetof(PluginField, data));
  SHOW(offsetof(PluginField, type));
  SHOW(offsetof(PluginField, length));
  SHOW(sizeof(PluginFieldCollection));
  SHOW(offsetof(PluginFieldCollection, nbFields));
  SHOW(offsetof(PluginFieldCollection, fields));
  return 0;
}
