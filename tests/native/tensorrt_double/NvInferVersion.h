// A test double: see NvInferRuntime.h.
#pragma once

#if !defined(REFT_DOUBLE_OF_TENSORRT_11) && !defined(REFT_DOUBLE_OF_TENSORRT_RTX)
#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 3
#elif defined(REFT_DOUBLE_OF_TENSORRT_11)
#define NV_TENSORRT_MAJOR 11
#define NV_TENSORRT_MINOR 1
#else
#define NV_TENSORRT_MAJOR 1
#define NV_TENSORRT_MINOR 7
#endif
#define NV_TENSORRT_PATCH 0
