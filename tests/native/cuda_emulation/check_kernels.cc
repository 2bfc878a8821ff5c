// Runs the emulated kernels over cases from standard input and holds each against float64. A case is a line of
//   op dtype tokens width rank slots activation first_half pattern in_place beside workspace falling seed
// as in Case below. Prints one line per op and type: cases, edited tokens, the worst error in units in the last place.
// A wrong value ends the process with status 1; sanitizers and the emulation end it in their own ways.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/edit_cuda.h"

namespace emulation {
extern bool falling;
}

namespace {

using reft::DType;

struct Case {
  std::string op;     // LoReFT or RED
  std::string dtype;  // float32, float16 or bfloat16
  int64_t tokens, width, rank, slots;
  int activation;  // as reft::Activation numbers them
  int first_half;
  std::string pattern;  // which tokens are edited: slot_of
  int in_place;
  std::string beside;  // which arrays begin one value beside a multiple of 16 bytes: none, all, h, y, first (U, scale), second (A, bias)
  int workspace;       // whether the launcher gets one
  int falling;         // the order of threads
  unsigned seed;
  std::string text;
};

[[noreturn]] void fail(const Case& c, const char* what, int64_t token, int64_t column, double got, double expected) {
  std::fprintf(stderr, "%s: token %lld, column %lld: got %.9g, expected %.9g; case %s\n", what, static_cast<long long>(token),
               static_cast<long long>(column), got, expected, c.text.c_str());
  std::exit(1);
}

DType dtype_of(const std::string& name) {
  return name == "float32" ? DType::kFloat32 : name == "float16" ? DType::kFloat16 : DType::kBFloat16;
}

double value_at(const void* values, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(values)[i];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(values)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i]);
}

void set(void* values, int64_t i, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(values)[i] = value;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(values)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(values)[i] = __float2bfloat16_rn(value);
  }
}

// The unit in the last place of a value of this type.
double ulp(double value, DType dtype) {
  const int fraction = dtype == DType::kFloat32 ? 23 : dtype == DType::kFloat16 ? 10 : 7;
  const int smallest = dtype == DType::kFloat16 ? -14 : -126;
  const int exponent = value == 0.0 ? smallest : std::max(std::ilogb(std::fabs(value)), smallest);
  return std::ldexp(1.0, exponent - fraction);
}

// Memory of exactly this size, so that AddressSanitizer sees one element beyond it. What is too large to be touched as a whole is mapped:
// untouched pages cost nothing.
class Array {
 public:
  Array(int64_t count, int64_t item, int64_t shift) : bytes_((count + shift) * item), mapped_(bytes_ > int64_t{1} << 30) {
    if (mapped_) {
      memory_ = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory_ == MAP_FAILED) std::abort();
    } else if (posix_memalign(&memory_, 64, static_cast<size_t>(std::max<int64_t>(bytes_, 1))) != 0) {
      std::abort();
    }
    data = static_cast<char*>(memory_) + shift * item;
  }
  Array(const Array&) = delete;
  ~Array() { mapped_ ? void(munmap(memory_, static_cast<size_t>(bytes_))) : std::free(memory_); }

  char* data;

 private:
  int64_t bytes_;
  bool mapped_;
  void* memory_;
};

int32_t slot_of(const Case& c, int64_t token, std::mt19937& random) {
  const auto slots = static_cast<int32_t>(c.slots);
  if (c.pattern == "none") return -1;
  if (c.pattern == "all") return slots - 1;
  if (c.pattern == "ends") return token < 7 ? 0 : token >= c.tokens - 7 ? slots - 1 : -1;
  if (c.pattern == "alternating") return token % 2 ? static_cast<int32_t>(token / 2) % slots : -1;
  const int32_t outside[] = {-1, -2, slots, INT32_MIN, INT32_MAX};
  const unsigned drawn = random() % (c.slots + 5);
  return drawn < c.slots ? static_cast<int32_t>(drawn) : outside[drawn - c.slots];
}

double activate(double z, int activation) {
  switch (static_cast<reft::Activation>(activation)) {
    case reft::Activation::kRelu:
      return std::max(z, 0.0);
    case reft::Activation::kGelu:
      return 0.5 * z * (1.0 + std::erf(z / std::sqrt(2.0)));
    case reft::Activation::kGeluTanh:
      return 0.5 * z * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (z + 0.044715 * z * z * z)));
    case reft::Activation::kSilu:
      return z / (1.0 + std::exp(-z));
    case reft::Activation::kTanh:
      return std::tanh(z);
    case reft::Activation::kSigmoid:
      return 1.0 / (1.0 + std::exp(-z));
    case reft::Activation::kNone:
      break;
  }
  return z;
}

// One row of y in float64, and the magnitudes that its terms add up to.
struct Row {
  std::vector<double> y, magnitude;
};

struct Banks {
  const void *first, *second, *b;  // U and A, or scale and bias
};

Row reference(const Case& c, DType dtype, const char* h, const Banks& banks, int64_t slot) {
  Row row{std::vector<double>(c.width), std::vector<double>(c.width)};
  if (c.op == "RED") {
    for (int64_t d = 0; d < c.width; ++d) {
      const int64_t at = slot * c.width + d;
      const double product = value_at(banks.first, at, dtype) * value_at(h, d, dtype), bias = value_at(banks.second, at, dtype);
      row.y[d] = product + bias;
      row.magnitude[d] = std::fabs(product) + std::fabs(bias);
    }
    return row;
  }
  for (int64_t d = 0; d < c.width; ++d) {
    row.y[d] = value_at(h, d, dtype);
    row.magnitude[d] = std::fabs(row.y[d]);
  }
  const std::vector<double> x = row.y;
  const int64_t activated = c.activation == 0 ? 0 : c.first_half ? c.rank / 2 : c.rank;
  for (int64_t k = 0; k < c.rank; ++k) {
    const int64_t at = (slot * c.rank + k) * c.width;
    double z = value_at(banks.b, slot * c.rank + k, dtype), magnitude = std::fabs(z);
    for (int64_t d = 0; d < c.width; ++d) {
      const double term = value_at(banks.second, at + d, dtype) * x[d];
      z += term;
      magnitude += std::fabs(term);
    }
    if (k < activated) z = activate(z, c.activation);
    for (int64_t d = 0; d < c.width; ++d) {
      const double u = value_at(banks.first, at + d, dtype);
      row.y[d] += u * z;
      row.magnitude[d] += std::fabs(u) * magnitude;
    }
  }
  return row;
}

// Units in the last place that got is off: for float32 of the summed magnitudes, for 16 bits of y, beyond what float32 sums may lose.
double error_of(double got, double expected, double magnitude, DType dtype) {
  const double off = std::fabs(got - expected), float32 = ulp(magnitude, DType::kFloat32);
  return dtype == DType::kFloat32 ? off / float32 : std::max(0.0, off - 8 * float32) / ulp(expected, dtype);
}

struct Tally {
  int64_t cases = 0, edited = 0;
  double worst = 0.0;
};

const char* launch(const Case& c, DType dtype, const Array& h, void* y, const int32_t* slot, const Banks& banks, void* workspace) {
  if (c.op == "RED") {
    return reft::launch_edit(reft::RedEdit{dtype, h.data, y, slot, banks.first, banks.second, c.tokens, c.slots, c.width}, nullptr);
  }
  const reft::Edit edit{dtype,       static_cast<reft::Activation>(c.activation),
                        c.first_half != 0,
                        h.data,      y,
                        slot,        banks.first,
                        banks.second, banks.b,
                        c.tokens,    c.slots,
                        c.rank,      c.width};
  return reft::launch_edit(edit, nullptr, workspace);
}

void run(const Case& c, Tally* tally) {
  const DType dtype = dtype_of(c.dtype);
  const int64_t item = reft::element_size(dtype), rank = c.op == "RED" ? 1 : c.rank, bank = rank * c.width;
  std::mt19937 random(c.seed);
  std::normal_distribution<float> normal;
  Array slot_memory(c.tokens, sizeof(int32_t), 0);
  auto* slot = reinterpret_cast<int32_t*>(slot_memory.data);
  std::vector<bool> used(c.slots);
  for (int64_t t = 0; t < c.tokens; ++t) {
    slot[t] = slot_of(c, t, random);
    if (reft::in_bank(slot[t], c.slots)) used[slot[t]] = true;
  }
  // The arrays are filled where they are read: a passed row's bits are arbitrary, NaNs among them.
  const auto shift = [&](const char* array) { return c.beside == array || c.beside == "all" ? 1 : 0; };
  Array h(c.tokens * c.width, item, shift("h")), other(c.in_place ? 0 : c.tokens * c.width, item, shift("y"));
  Array first(c.slots * bank, item, shift("first")), second(c.slots * bank, item, shift("second")), b(c.slots * rank, item, shift("b"));
  const bool sparse = c.tokens * c.width > int64_t{1} << 28;
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const bool edited = reft::in_bank(slot[t], c.slots);
    if (sparse && !edited) continue;
    rows.push_back(t);
    for (int64_t d = 0; d < c.width; ++d) {
      if (edited) {
        set(h.data, t * c.width + d, dtype, normal(random));
      } else {
        const uint32_t bits = random();
        std::memcpy(h.data + (t * c.width + d) * item, &bits, item);
      }
    }
  }
  const float a_scale = c.op == "RED" ? 1.0f : 1.0f / std::sqrt(static_cast<float>(c.width));
  const float u_scale = c.op == "RED" ? 1.0f : 1.0f / std::sqrt(static_cast<float>(rank));
  for (int64_t s = 0; s < c.slots; ++s) {
    for (int64_t i = 0; used[s] && i < bank; ++i) {
      set(first.data, s * bank + i, dtype, normal(random) * u_scale);
      set(second.data, s * bank + i, dtype, normal(random) * a_scale);
    }
    for (int64_t k = 0; used[s] && k < rank; ++k) set(b.data, s * rank + k, dtype, normal(random));
  }
  const int64_t row_bytes = c.width * item;
  std::vector<char> before(rows.size() * row_bytes);
  for (size_t i = 0; i < rows.size(); ++i) std::memcpy(&before[i * row_bytes], h.data + rows[i] * row_bytes, row_bytes);
  if (!c.in_place) std::memset(other.data, 0xff, c.tokens * row_bytes);

  char* const y = c.in_place ? h.data : other.data;
  const Banks banks{first.data, second.data, b.data};
  const int64_t workspace_bytes = c.op == "RED" || !c.workspace ? 0 : reft::workspace_bytes(c.tokens, c.rank);
  Array workspace(workspace_bytes, 1, 0);
  std::memset(workspace.data, 0xff, workspace_bytes);
  emulation::falling = c.falling != 0;
  if (const char* error = launch(c, dtype, h, y, slot, banks, c.workspace ? workspace.data : nullptr)) {
    std::fprintf(stderr, "the launch failed: %s; case %s\n", error, c.text.c_str());
    std::exit(1);
  }

  ++tally->cases;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t t = rows[i];
    const char* x = &before[i * row_bytes];
    if (!reft::in_bank(slot[t], c.slots)) {
      if (std::memcmp(y + t * row_bytes, x, row_bytes) != 0) fail(c, "a token that is passed through changed", t, 0, 0.0, 0.0);
      continue;
    }
    ++tally->edited;
    const Row row = reference(c, dtype, x, banks, slot[t]);
    for (int64_t d = 0; d < c.width; ++d) {
      const double got = value_at(y, t * c.width + d, dtype), error = error_of(got, row.y[d], row.magnitude[d], dtype);
      if (!(error <= (dtype == DType::kFloat32 ? 8.0 : 0.501))) fail(c, "a wrong value", t, d, got, row.y[d]);
      tally->worst = std::max(tally->worst, error);
    }
  }
}

}  // namespace

int main() {
  std::map<std::string, Tally> tallies;
  for (std::string line; std::getline(std::cin, line);) {
    Case c;
    std::istringstream words(line);
    words >> c.op >> c.dtype >> c.tokens >> c.width >> c.rank >> c.slots >> c.activation >> c.first_half >> c.pattern >> c.in_place >>
        c.beside >> c.workspace >> c.falling >> c.seed;
    if (!words) {
      std::fprintf(stderr, "not a case: %s\n", line.c_str());
      return 2;
    }
    c.text = line;
    run(c, &tallies[c.op + " " + c.dtype]);
  }
  for (const auto& [name, tally] : tallies) {
    std::printf("%s cases %lld edited %lld worst %.4f\n", name.c_str(), static_cast<long long>(tally.cases),
                static_cast<long long>(tally.edited), tally.worst);
  }
  return 0;
}
