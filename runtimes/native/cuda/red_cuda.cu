// RED on an NVIDIA GPU. Not yet run on one: compiled for it, and run in an emulation of its threads (tests/native/cuda_emulation).
//
// Bound by memory: h is read once and y written once. A thread takes kLanes columns of kRows neighbouring tokens, and loads scale and bias
// again only where the slot changes. In place a token outside the bank costs the look at its slot.

#include "cuda/edit_cuda.h"
#include "cuda/lanes.h"

namespace reft {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Arguments {
  const T* h;
  T* y;
  const int32_t* slot;
  const T* scale;
  const T* bias;
  int64_t tokens;
  int64_t slots;
  int64_t width;
};

template <class T, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads) red_kernel(Arguments<T> a) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kLanes;
  if (column >= a.width) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const bool in_place = a.h == a.y;
  int32_t loaded = -1;
  Lanes<T, kLanes> scale, bias;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t token = first + i;
    if (token >= a.tokens) return;
    const int32_t slot = a.slot[token];
    const bool edited = in_bank(slot, a.slots);
    if (!edited && in_place) continue;
    Lanes<T, kLanes> x = load<T, kLanes>(a.h + token * a.width + column);
    if (edited) {
      if (slot != loaded) {
        scale = load_bank<T, kLanes>(a.scale + slot * a.width + column);
        bias = load_bank<T, kLanes>(a.bias + slot * a.width + column);
        loaded = slot;
      }
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        from_float(fmaf(to_float(scale.value[lane]), to_float(x.value[lane]), to_float(bias.value[lane])), &x.value[lane]);
      }
    }
    store<T, kLanes>(a.y + token * a.width + column, x);
  }
}

template <class T, int kLanes, int kRows>
cudaError_t launch_rows(Arguments<T> arguments, cudaStream_t stream) {
  const int64_t across = (arguments.width + kThreads * kLanes - 1) / (kThreads * kLanes);
  const int64_t down = (arguments.tokens + kRows - 1) / kRows;
  if (down > 0x7fffffff || across > 0xffff) return cudaErrorInvalidConfiguration;
  void* parameters[] = {&arguments};
  const dim3 grid(static_cast<unsigned>(down), static_cast<unsigned>(across));
  return cudaLaunchKernel(reinterpret_cast<const void*>(&red_kernel<T, kLanes, kRows>), grid, dim3(kThreads), parameters, 0, stream);
}

template <class T>
cudaError_t launch(const RedEdit& edit, cudaStream_t stream) {
  Arguments<T> a{static_cast<const T*>(edit.h),    static_cast<T*>(edit.y), edit.slot,  static_cast<const T*>(edit.scale),
                 static_cast<const T*>(edit.bias), edit.tokens,             edit.slots, edit.width};
  constexpr int kLanes = 16 / sizeof(T);
  const bool vectors = edit.width % kLanes == 0 && aligned(edit.h) && aligned(edit.y) && aligned(edit.scale) && aligned(edit.bias);
  if (!vectors) return launch_rows<T, 1, 1>(a, stream);
  return edit.tokens < kManyTokens ? launch_rows<T, kLanes, 1>(a, stream) : launch_rows<T, kLanes, 4>(a, stream);
}

}  // namespace

const char* launch_edit(const RedEdit& edit, void* stream) {
  if (edit.tokens == 0 || edit.width == 0) return nullptr;
  return launch_by_type(edit.dtype, [&](auto value) { return launch<decltype(value)>(edit, static_cast<cudaStream_t>(stream)); });
}

}  // namespace reft
