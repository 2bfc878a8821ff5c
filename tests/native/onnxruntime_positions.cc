// The hand-declared slice of onnxruntime's C ABI against its own header: compiled, never run.
#include <onnxruntime_c_api.h>

#include <cstddef>

#include "ort/ort_abi.h"

namespace {

template <int kPosition, class Signature>
constexpr size_t place(reft::ort::ApiFunction<kPosition, Signature>) {
  return kPosition * sizeof(void*);
}

}  // namespace

#define SAME_PLACE(ours, theirs) static_assert(place(reft::ort::ours{}) == offsetof(OrtApi, theirs), #theirs)
#define SAME_MEMBER(ours, theirs, member) static_assert(offsetof(reft::ort::ours, member) == offsetof(theirs, member), #member)

SAME_PLACE(CreateStatus, CreateStatus);
SAME_PLACE(GetErrorMessage, GetErrorMessage);
SAME_PLACE(CreateCustomOpDomain, CreateCustomOpDomain);
SAME_PLACE(CustomOpDomainAdd, CustomOpDomain_Add);
SAME_PLACE(AddCustomOpDomain, AddCustomOpDomain);
SAME_PLACE(GetTensorMutableData, GetTensorMutableData);
SAME_PLACE(GetTensorElementType, GetTensorElementType);
SAME_PLACE(GetDimensionsCount, GetDimensionsCount);
SAME_PLACE(GetDimensions, GetDimensions);
SAME_PLACE(GetSymbolicDimensions, GetSymbolicDimensions);
SAME_PLACE(GetTensorTypeAndShape, GetTensorTypeAndShape);
SAME_PLACE(GetAttributeFloat, KernelInfoGetAttribute_float);
SAME_PLACE(GetAttributeInt64, KernelInfoGetAttribute_int64);
SAME_PLACE(GetAttributeString, KernelInfoGetAttribute_string);
SAME_PLACE(GetInput, KernelContext_GetInput);
SAME_PLACE(GetOutput, KernelContext_GetOutput);
SAME_PLACE(ReleaseStatus, ReleaseStatus);
SAME_PLACE(ReleaseShapeInfo, ReleaseTensorTypeAndShapeInfo);
SAME_PLACE(ReleaseAllocator, ReleaseAllocator);
SAME_PLACE(GetComputeStream, KernelContext_GetGPUComputeStream);
SAME_PLACE(GetInputShapeInfo, ShapeInferContext_GetInputTypeShape);
SAME_PLACE(SetOutputShapeInfo, ShapeInferContext_SetOutputTypeShape);
SAME_PLACE(SetSymbolicDimensions, SetSymbolicDimensions);
SAME_PLACE(ParallelFor, KernelContext_ParallelFor);
SAME_PLACE(GetScratchBuffer, KernelContext_GetScratchBuffer);
SAME_PLACE(KernelInfoGetAllocator, KernelInfoGetAllocator);
SAME_PLACE(GetTypeAndShapeReference, GetTensorElementTypeAndShapeDataReference);

SAME_MEMBER(Allocator, OrtAllocator, Free);
SAME_MEMBER(Allocator, OrtAllocator, Info);
SAME_MEMBER(CustomOp, OrtCustomOp, KernelComputeV2);
SAME_MEMBER(CustomOp, OrtCustomOp, GetMayInplace);
SAME_MEMBER(CustomOp, OrtCustomOp, ReleaseAliasMap);
static_assert(reft::ort::kMemoryDefault == OrtMemTypeDefault, "OrtMemType");
static_assert(reft::ort::kElementInt32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, "ONNXTensorElementDataType");
