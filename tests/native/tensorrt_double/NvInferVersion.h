// A test double: see NvInferRuntime.h.
#pragma once

#ifndef REFT_DOUBLE_OF_TENSORRT_11
#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 3
#else
#define NV_TENSORRT_MAJOR 11
#define NV_TENSORRT_MINOR 1
#endif
#define NV_TENSORRT_PATCH 0
