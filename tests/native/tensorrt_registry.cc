// Loads the plugin through the registry of a real TensorRT library, without a GPU:
//   tensorrt_registry <libnvinfer_lean.so.N> load <libreft_trt.so>         through IPluginRegistry::loadLibrary
//   tensorrt_registry <libnvinfer_lean.so.N> open <libreft_trt_autoload.so> by opening the library, as hosts of self-registering plugins do
//   tensorrt_registry <libnvinfer_lean.so.N> open-linked <...>              the same where TensorRT is in the global scope, as if linked
// Prints what happened, one line each; the exit status is 0 where both plugins could be created and read back.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

using namespace nvinfer1;

namespace {

struct Logger final : ILogger {
  void log(Severity severity, const AsciiChar* text) noexcept override {
    if (severity <= Severity::kERROR) std::printf("logger: %s\n", text);
  }
};
Logger logger;

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  std::setvbuf(stdout, nullptr, _IONBF, 0);
  void* tensorrt = dlopen(arguments[1], RTLD_NOW | (std::strcmp(arguments[2], "open-linked") == 0 ? RTLD_GLOBAL : RTLD_LOCAL));
  if (tensorrt == nullptr) return std::printf("%s\n", dlerror()), 2;
  const auto version = reinterpret_cast<int32_t (*)() noexcept>(dlsym(tensorrt, "getInferLibVersion"));
  const auto registry = reinterpret_cast<IPluginRegistry* (*)() noexcept>(dlsym(tensorrt, "getPluginRegistry"))();
  std::printf("library %d headers %ld\n", version(), NV_TENSORRT_VERSION);
  // The first runtime's logger becomes the global one, although without a GPU there will be no runtime.
  const auto create = reinterpret_cast<void* (*)(void*, int32_t)>(dlsym(tensorrt, "createInferRuntime_INTERNAL"));
  create(&logger, version());

  void* handle = nullptr;
  if (std::strcmp(arguments[2], "load") == 0) {
    handle = registry->loadLibrary(arguments[3]);
    std::printf("loaded %d\n", handle != nullptr);
  } else {
    std::printf("opened %d\n", dlopen(arguments[3], RTLD_LAZY | RTLD_NODELETE) != nullptr);
  }
  IPluginCreatorInterface* found = registry->getCreator("LoReFT", "1", "ai.reft");
  std::printf("creator %s\n", found != nullptr ? found->getInterfaceInfo().kind : "none");
  if (found == nullptr) return 1;
  auto* creator = static_cast<IPluginCreatorV3One*>(found);

  const PluginField wrong{"activation", "softmax", PluginFieldType::kCHAR, 7};
  const PluginFieldCollection wrong_fields{1, &wrong};
  std::printf("refused %d\n", creator->createPlugin("edit", &wrong_fields, TensorRTPhase::kBUILD) == nullptr);
  const PluginField gelu{"activation", "gelu", PluginFieldType::kCHAR, 4};
  const PluginFieldCollection fields{1, &gelu};
  IPluginV3* plugin = creator->createPlugin("edit", &fields, TensorRTPhase::kBUILD);
  if (plugin == nullptr) return 1;
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  IPluginV3* again = creator->createPlugin("edit", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  std::printf("read back %d\n", again != nullptr);
  bool worked = again != nullptr;
  delete again;
  delete plugin;

  // RED has no attributes, and an engine stores none.
  auto* red = static_cast<IPluginCreatorV3One*>(registry->getCreator("RED", "1", "ai.reft"));
  std::printf("RED creator %s\n", red != nullptr ? red->getInterfaceInfo().kind : "none");
  if (red == nullptr) return 1;
  plugin = red->createPlugin("edit", red->getFieldNames(), TensorRTPhase::kBUILD);
  if (plugin == nullptr) return 1;
  runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  again = red->createPlugin("edit", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  std::printf("RED read back %d\n", again != nullptr);
  worked = worked && again != nullptr;
  delete again;
  delete plugin;
  if (handle != nullptr) registry->deregisterLibrary(handle);
  std::printf("done\n");
  return worked ? 0 : 1;
}
