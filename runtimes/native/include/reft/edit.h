// One edit over a batch of tokens, and its arithmetic for host and device:
//
//     LoReFT  y[t] = h[t] + U[s]^T act(A[s] h[t] + b[s])      s = slot[t]
//     RED     y[t] = scale[s] * h[t] + bias[s]                (Wu et al. 2024, Advancing Parameter Efficiency in Fine-tuning via
//                                                             Representation Editing)
//
// A slot outside [0, slots) passes h[t] through, bit for bit. Sums are float32; each value of y is rounded to its type once.
//
// No framework is included here; the CPU loop, the CUDA kernel and every wrapper share these definitions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define REFT_HOST_DEVICE __host__ __device__
#else
#define REFT_HOST_DEVICE
#endif

namespace reft {

// Values of ONNX TensorProto.DataType.
enum class DType : int { kFloat32 = 1, kFloat16 = 10, kBFloat16 = 16 };

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Longer than any trained rank, also several adapters stacked; it bounds the scratch space of a block of rows.
constexpr int64_t kMaxRank = 1024;

struct Edit {
  DType dtype;
  Activation activation;
  bool first_half;      // the activation acts on the first floor(rank / 2) rows of z only
  const void* h;        // [tokens, width]
  void* y;              // [tokens, width]: the same memory as h (in place) or none of it
  const int32_t* slot;  // [tokens]
  const void* U;        // [slots, rank, width]
  const void* A;        // [slots, rank, width]
  const void* b;        // [slots, rank]
  int64_t tokens;
  int64_t slots;
  int64_t rank;
  int64_t width;
};

struct RedEdit {
  DType dtype;
  const void* h;        // [tokens, width]
  void* y;              // [tokens, width]: the same memory as h (in place) or none of it
  const int32_t* slot;  // [tokens]
  const void* scale;    // [slots, width]
  const void* bias;     // [slots, width]
  int64_t tokens;
  int64_t slots;
  int64_t width;
};

REFT_HOST_DEVICE inline bool in_bank(int32_t slot, int64_t slots) { return slot >= 0 && slot < slots; }

REFT_HOST_DEVICE inline int64_t activated_rows(const Edit& edit) {
  return edit.activation == Activation::kNone ? 0 : edit.first_half ? edit.rank / 2 : edit.rank;
}

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// act(z) in float32. gelu is z Phi(z); gelu_tanh its tanh approximation.
REFT_HOST_DEVICE inline float activate(float z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return z < 0.0f ? 0.0f : z;  // a NaN stays one
    case Activation::kGelu:
      return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * z * (1.0f + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case Activation::kSilu:
      return z / (1.0f + expf(-z));
    case Activation::kTanh:
      return tanhf(z);
    case Activation::kSigmoid:
      return 1.0f / (1.0f + expf(-z));
    case Activation::kNone:
      break;
  }
  return z;
}

// By the name in the node's attribute; false where the op does not know it.
inline bool parse_activation(const char* name, Activation* activation) {
  static constexpr const char* kNames[] = {"", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"};
  for (int i = 0; i < 7; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *activation = static_cast<Activation>(i);
      return true;
    }
  }
  return false;
}
constexpr const char* kActivationNames = "\"\", relu, gelu, gelu_tanh, silu, tanh, sigmoid";

// "all" or "first_half"; false for anything else.
inline bool parse_activated(const char* name, bool* first_half) {
  *first_half = std::strcmp(name, "first_half") == 0;
  return *first_half || std::strcmp(name, "all") == 0;
}

}  // namespace reft
