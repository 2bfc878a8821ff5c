// What the plugin library exports beside TensorRT's getCreators and setLoggerFinder.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

#if defined(_WIN32)
#define REFT_TRT_EXPORT extern "C" __declspec(dllexport)
#else
#define REFT_TRT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// "LoReFT 1, RED 1, TensorRT 10.3.0": the versions of the plugins and of the headers they were compiled with.
REFT_TRT_EXPORT const char* reft_trt_version();

// GPU architectures that the kernels were compiled for, separated by commas: for example "80,87".
REFT_TRT_EXPORT const char* reft_trt_cuda_architectures();

// getCreators by a name that no other plugin library in the process has.
REFT_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* reft_trt_creators(int32_t* count);

// Where to log when TensorRT hands out no ILoggerFinder: its exported getLogger, and what its getInferLibVersion says.
REFT_TRT_EXPORT void reft_trt_use_logger(nvinfer1::ILogger* (*get_logger)() noexcept, int32_t version);
