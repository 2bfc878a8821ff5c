// Registers the plugins with the TensorRT of the process when this library is opened: for hosts that only open plugin libraries, namely
// ONNX Runtime's TensorRT provider (trt_extra_plugin_lib_paths) and TensorRT-Edge-LLM (EDGELLM_PLUGIN_PATH).
//
// Nothing of TensorRT is linked: the host has brought its own, often outside the global scope, and it is that registry which counts. Its
// virtual table changed with TensorRT 11, so this library serves the major version whose headers it was compiled with, and no other.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>

#include "tensorrt/reft_trt.h"

namespace {

struct Symbols {
  nvinfer1::IPluginRegistry* (*registry)() noexcept;
  nvinfer1::ILogger* (*logger)() noexcept;
  int32_t (*version)() noexcept;
};

bool find_in(void* library, Symbols* symbols) {
  symbols->registry = reinterpret_cast<decltype(symbols->registry)>(dlsym(library, "getPluginRegistry"));
  symbols->logger = reinterpret_cast<decltype(symbols->logger)>(dlsym(library, "getLogger"));
  symbols->version = reinterpret_cast<decltype(symbols->version)>(dlsym(library, "getInferLibVersion"));
  return symbols->registry != nullptr && symbols->version != nullptr;
}

// By name first: a process may hold several TensorRTs, and the one of our version need not be in the global scope.
bool find_tensorrt(Symbols* symbols) {
  const char* names[] = {"libnvinfer.so", "libnvinfer_lean.so", "libnvinfer_dispatch.so", "libtensorrt_rtx.so"};
  for (const char* name : names) {
    char numbered[64];
    std::snprintf(numbered, sizeof numbered, "%s.%d", name, NV_TENSORRT_MAJOR);
    void* library = dlopen(numbered, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const bool found = find_in(library, symbols);
    dlclose(library);
    if (found) return true;
  }
  return find_in(RTLD_DEFAULT, symbols);
}

// TensorRT-RTX, whose major version is 1, changed its interfaces between minor versions.
bool same_registry(int32_t version) {
  return NV_TENSORRT_MAJOR >= 10 ? version / 10000 == NV_TENSORRT_MAJOR : version / 100 == NV_TENSORRT_VERSION / 100;
}

__attribute__((constructor)) void register_creators() {
  Symbols tensorrt;
  if (!find_tensorrt(&tensorrt)) {
    std::fprintf(stderr, "ai.reft plugins: not registered: no TensorRT %d is loaded in this process; open this library after TensorRT\n",
                 NV_TENSORRT_MAJOR);
    return;
  }
  const int32_t version = tensorrt.version();
  if (!same_registry(version)) {
    std::fprintf(stderr,
                 "ai.reft plugins: not registered: this process runs TensorRT %d.%d, this library was compiled for %d.%d; compile it with the "
                 "headers of that TensorRT (TENSORRT_INCLUDE_DIR)\n",
                 version / 10000, version / 100 % 100, NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
    return;
  }
  reft_trt_use_logger(tensorrt.logger, version);
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = reft_trt_creators(&count);
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    if (!tensorrt.registry()->registerCreator(*creator, creator->getPluginNamespace())) {
      std::fprintf(stderr, "ai.reft plugins: TensorRT's registry refused %s %s of %s; is it registered already?\n",
                   creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace());
    }
  }
}

}  // namespace
