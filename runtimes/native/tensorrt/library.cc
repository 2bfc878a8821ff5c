// What the plugin library says of itself, and where TensorRT finds its plugins.

#include "tensorrt/edit_plugin.h"
#include "tensorrt/host_log.h"
#include "tensorrt/reft_trt.h"

#define REFT_TEXT(x) #x
#define REFT_TEXT_OF(x) REFT_TEXT(x)

const char* reft_trt_version() {
  return "LoReFT 1, RED 1, TensorRT " REFT_TEXT_OF(NV_TENSORRT_MAJOR) "." REFT_TEXT_OF(NV_TENSORRT_MINOR) "." REFT_TEXT_OF(
      NV_TENSORRT_PATCH);
}

const char* reft_trt_cuda_architectures() { return REFT_CUDA_ARCHITECTURES; }

nvinfer1::IPluginCreatorInterface* const* reft_trt_creators(int32_t* count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {reft::trt::lo_reft_creator(), reft::trt::red_creator()};
  *count = creators[0] != nullptr && creators[1] != nullptr ? 2 : 0;
  return creators;
}

void reft_trt_use_logger(nvinfer1::ILogger* (*get_logger)() noexcept, int32_t version) {
  reft::trt::use_global_logger(get_logger, version);
}

// TensorRT calls these two by name when it loads the library: IPluginRegistry::loadLibrary, trtexec --dynamicPlugins.
REFT_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) { return reft_trt_creators(&count); }

REFT_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { reft::trt::use_logger_finder(finder); }
