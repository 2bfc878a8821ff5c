// The library's own C interface: it drives the kernels without a runtime around them, and tells what this build can do.
//
// A function that can fail returns null on success, else a message that lives until the thread's next call.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define REFT_EXPORT extern "C" __declspec(dllexport)
#else
#define REFT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Pointers and shapes as in reft/edit.h. dtype: 1 float32, 10 float16, 16 bfloat16 (ONNX's numbers). y is h, or does not overlap it.
// kernels: one of reft_cpu_kernels(), or null for the fastest.
REFT_EXPORT const char* reft_edit_cpu(int dtype, const void* h, void* y, const int32_t* slot, const void* U, const void* A, const void* b,
                                      int64_t tokens, int64_t slots, int64_t rank, int64_t width, const char* activation,
                                      const char* activated, const char* kernels);

// The same on device pointers, queued on stream (a cudaStream_t, null for the default one) of the thread's current device. workspace: null,
// or reft_edit_cuda_workspace's bytes of the device, which few tokens of a high rank take to spread over its SMs.
REFT_EXPORT const char* reft_edit_cuda(int dtype, const void* h, void* y, const int32_t* slot, const void* U, const void* A, const void* b,
                                       int64_t tokens, int64_t slots, int64_t rank, int64_t width, const char* activation,
                                       const char* activated, void* workspace, void* stream);
REFT_EXPORT int64_t reft_edit_cuda_workspace(int64_t tokens, int64_t rank);

// RED: scale and bias [slots, width].
REFT_EXPORT const char* reft_red_cpu(int dtype, const void* h, void* y, const int32_t* slot, const void* scale, const void* bias,
                                     int64_t tokens, int64_t slots, int64_t width, const char* kernels);

REFT_EXPORT const char* reft_red_cuda(int dtype, const void* h, void* y, const int32_t* slot, const void* scale, const void* bias,
                                      int64_t tokens, int64_t slots, int64_t width, void* stream);

// Kernels that this processor runs, the fastest first, separated by commas: for example "avx512,avx2,portable".
REFT_EXPORT const char* reft_cpu_kernels();

// GPU architectures that the CUDA kernels were compiled for, separated by commas: for example "80,90"; "" in a build without CUDA.
REFT_EXPORT const char* reft_cuda_architectures();

// What the ONNX Runtime ops, LoReFT and RED together, have done in this process: calls, calls in place, edited rows, calls spread over threads. reset: start anew.
REFT_EXPORT void reft_statistics(int64_t counts[4], int reset);
