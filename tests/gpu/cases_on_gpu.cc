// The other half of native/cuda_emulation/check_kernels.cc where a GPU is: its arrays go to device memory of exactly their sizes, each as
// far from a multiple of 16 bytes as on the host, and the op library's C interface launches the kernels on them. Under compute-sanitizer an
// access of one element beyond an array is seen.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "c_api/reft.h"
#include "cuda/edit_cuda.h"

namespace emulation {
bool falling;  // a GPU orders its threads itself
}

namespace {

constexpr const char* kActivations[] = {"", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"};

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s (%s)\n", call, cudaGetErrorName(status), cudaGetErrorString(status));
  std::exit(3);
}

// A copy of an array of the host, which may be empty.
class OnDevice {
 public:
  OnDevice(const void* host, int64_t bytes) : bytes_(static_cast<size_t>(bytes)), shift_(reinterpret_cast<uintptr_t>(host) % 16) {
    check(cudaMalloc(&memory_, std::max<size_t>(shift_ + bytes_, 1)), "cudaMalloc");
    data = static_cast<char*>(memory_) + shift_;
    if (bytes_ > 0) check(cudaMemcpy(data, host, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(memory_); }

  void read(void* host) const { check(cudaMemcpy(host, data, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy from the device"); }

  char* data;

 private:
  size_t bytes_, shift_;
  void* memory_;
};

}  // namespace

int64_t reft::workspace_bytes(int64_t tokens, int64_t rank) { return reft_edit_cuda_workspace(tokens, rank); }

const char* reft::launch_edit(const Edit& edit, void* stream, void* workspace) {
  const int64_t item = element_size(edit.dtype), rows = edit.tokens * edit.width * item, bank = edit.slots * edit.rank * edit.width * item;
  const bool in_place = edit.h == edit.y;
  const OnDevice h(edit.h, rows), y(edit.y, in_place ? 0 : rows), slot(edit.slot, edit.tokens * sizeof(int32_t));
  const OnDevice U(edit.U, bank), A(edit.A, bank), b(edit.b, edit.slots * edit.rank * item);
  const OnDevice parts(workspace, workspace == nullptr ? 0 : workspace_bytes(edit.tokens, edit.rank));
  const OnDevice& output = in_place ? h : y;
  const char* error = reft_edit_cuda(static_cast<int>(edit.dtype), h.data, output.data, reinterpret_cast<const int32_t*>(slot.data), U.data,
                                     A.data, b.data, edit.tokens, edit.slots, edit.rank, edit.width,
                                     kActivations[static_cast<int>(edit.activation)], edit.first_half ? "first_half" : "all",
                                     workspace == nullptr ? nullptr : parts.data, stream);
  if (error == nullptr) output.read(edit.y);
  return error;
}

const char* reft::launch_edit(const RedEdit& edit, void* stream) {
  const int64_t item = element_size(edit.dtype), rows = edit.tokens * edit.width * item, bank = edit.slots * edit.width * item;
  const bool in_place = edit.h == edit.y;
  const OnDevice h(edit.h, rows), y(edit.y, in_place ? 0 : rows), slot(edit.slot, edit.tokens * sizeof(int32_t));
  const OnDevice scale(edit.scale, bank), bias(edit.bias, bank);
  const OnDevice& output = in_place ? h : y;
  const char* error = reft_red_cuda(static_cast<int>(edit.dtype), h.data, output.data, reinterpret_cast<const int32_t*>(slot.data),
                                    scale.data, bias.data, edit.tokens, edit.slots, edit.width, stream);
  if (error == nullptr) output.read(edit.y);
  return error;
}
