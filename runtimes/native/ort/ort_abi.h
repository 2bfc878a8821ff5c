// The slice of ONNX Runtime's C ABI that a custom op needs, declared by hand: no wheel of onnxruntime ships its headers, and with
// positions instead of headers one binary runs on every release from 1.18 on.
//
// OrtApi only grows at its end: a function's position never changes (onnxruntime asserts that about itself in
// core/session/onnxruntime_c_api.cc). OrtCustomOp is versioned by its first member. The numbers behind each line are the API
// versions that introduced it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reft::ort {

struct StatusTag;
using Status = StatusTag*;  // null: success; whoever receives one releases it or hands it on

struct Context;     // OrtKernelContext
struct KernelInfo;  // OrtKernelInfo
struct Value;       // OrtValue
struct ShapeInfo;   // OrtTensorTypeAndShapeInfo
struct ShapeInferContext;
struct Domain;          // OrtCustomOpDomain
struct SessionOptions;  // OrtSessionOptions
struct MemoryInfo;      // OrtMemoryInfo

// The first members of OrtAllocator.
struct Allocator {
  uint32_t version;
  void* (*Alloc)(Allocator*, size_t);
  void (*Free)(Allocator*, void*);
  const MemoryInfo* (*Info)(const Allocator*);
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };

constexpr int kElementInt32 = 6;  // ONNX TensorProto.INT32
constexpr int kMemoryDefault = 0;  // OrtMemTypeDefault: the provider's own

struct Api {
  const void* position[1];
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t) noexcept;
  const char* (*GetVersionString)() noexcept;
};

template <int kPosition, class Signature>
struct ApiFunction;

template <int kPosition, class Result, class... Arguments>
struct ApiFunction<kPosition, Result(Arguments...)> {
  static Result call(const Api* api, Arguments... arguments) {
    using Function = Result (*)(Arguments...) noexcept;
    return reinterpret_cast<Function>(const_cast<void*>(api->position[kPosition]))(arguments...);
  }
};

using CreateStatus = ApiFunction<0, Status(int, const char*)>;                                             // 1
using GetErrorMessage = ApiFunction<2, const char*(Status)>;                                               // 1
using CreateCustomOpDomain = ApiFunction<26, Status(const char*, Domain**)>;                               // 1
using CustomOpDomainAdd = ApiFunction<27, Status(Domain*, const void*)>;                                   // 1
using AddCustomOpDomain = ApiFunction<28, Status(SessionOptions*, Domain*)>;                               // 1
using GetTensorMutableData = ApiFunction<51, Status(Value*, void**)>;                                      // 1
using GetTensorElementType = ApiFunction<60, Status(const ShapeInfo*, int*)>;                              // 1
using GetDimensionsCount = ApiFunction<61, Status(const ShapeInfo*, size_t*)>;                             // 1
using GetDimensions = ApiFunction<62, Status(const ShapeInfo*, int64_t*, size_t)>;                         // 1
using GetSymbolicDimensions = ApiFunction<63, Status(const ShapeInfo*, const char**, size_t)>;              // 1
using GetTensorTypeAndShape = ApiFunction<65, Status(const Value*, ShapeInfo**)>;                          // 1
using GetAttributeFloat = ApiFunction<85, Status(const KernelInfo*, const char*, float*)>;                 // 1
using GetAttributeInt64 = ApiFunction<86, Status(const KernelInfo*, const char*, int64_t*)>;               // 1
using GetAttributeString = ApiFunction<87, Status(const KernelInfo*, const char*, char*, size_t*)>;        // 1
using GetInput = ApiFunction<90, Status(const Context*, size_t, const Value**)>;                           // 1
using GetOutput = ApiFunction<91, Status(Context*, size_t, const int64_t*, size_t, Value**)>;              // 1
using ReleaseStatus = ApiFunction<93, void(Status)>;                                                       // 1
using ReleaseShapeInfo = ApiFunction<99, void(ShapeInfo*)>;                                                // 1
using ReleaseAllocator = ApiFunction<132, void(Allocator*)>;                                               // 4
using GetComputeStream = ApiFunction<193, Status(const Context*, void**)>;                                 // 10
using GetInputShapeInfo = ApiFunction<268, Status(const ShapeInferContext*, size_t, ShapeInfo**)>;         // 17
using SetOutputShapeInfo = ApiFunction<270, Status(const ShapeInferContext*, size_t, const ShapeInfo*)>;   // 17
using SetSymbolicDimensions = ApiFunction<271, Status(ShapeInfo*, const char**, size_t)>;                  // 17
using ParallelFor = ApiFunction<274, Status(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>;  // 17
using GetScratchBuffer = ApiFunction<277, Status(const Context*, const MemoryInfo*, size_t, void**)>;      // 18
using KernelInfoGetAllocator = ApiFunction<278, Status(const KernelInfo*, int, Allocator**)>;              // 18
using GetTypeAndShapeReference = ApiFunction<414, Status(const Value*, int*, const int64_t**, size_t*)>;   // 25

// The API version that our OrtCustomOp is laid out for; asking for more would promise members that are not there.
constexpr uint32_t kApiVersion = 18;
// The first whose GetTypeAndShapeReference needs no allocation per tensor.
constexpr uint32_t kShapeReferenceVersion = 25;

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, Context*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);                                  // 13
  int (*GetVariadicInputMinArity)(const CustomOp*);                                    // 14
  int (*GetVariadicInputHomogeneity)(const CustomOp*);                                 // 14
  int (*GetVariadicOutputMinArity)(const CustomOp*);                                   // 14
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);                                // 14
  Status (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);    // 16
  Status (*KernelComputeV2)(void*, Context*);                                          // 16
  Status (*InferOutputShape)(const CustomOp*, ShapeInferContext*);                     // 17
  int (*GetStartVersion)(const CustomOp*);                                             // 17
  int (*GetEndVersion)(const CustomOp*);                                               // 17
  size_t (*GetMayInplace)(int**, int**);                                               // 18
  void (*ReleaseMayInplace)(int*, int*);                                               // 18
  size_t (*GetAliasMap)(int**, int**);                                                 // 18
  void (*ReleaseAliasMap)(int*, int*);                                                 // 18
};
static_assert(sizeof(void*) != 8 || (offsetof(CustomOp, CreateKernelV2) == 136 && offsetof(CustomOp, GetMayInplace) == 176 &&
                                     sizeof(CustomOp) == 208),
              "OrtCustomOp has moved");

}  // namespace reft::ort
