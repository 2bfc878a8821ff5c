// Every vector kernel of this processor against the portable one, where Python does not run: cross-compiled and emulated.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "c_api/reft.h"
#include "cpu/half.h"

using reft::from_float;
using reft::to_float;

template <class T>
static bool compare(int dtype, float tolerance, const std::string& kernels) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto draw = [&](size_t count, float scale) {
    std::vector<T> out(count);
    for (T& value : out) from_float(normal(random) * scale, &value);
    return out;
  };
  for (int64_t width : {1, 3, 4, 7, 16, 65, 513}) {
    for (int64_t rank : {1, 2, 3, 4, 6, 9}) {
      for (int64_t tokens : {1, 3, 4, 19}) {
        const int64_t slots = 2;
        std::vector<T> h = draw(tokens * width, 1), U = draw(slots * rank * width, 0.5f), A = draw(slots * rank * width, 0.2f),
                       b = draw(slots * rank, 1), y = h, expected = h;
        std::vector<int32_t> slot(tokens);
        for (int64_t t = 0; t < tokens; ++t) slot[t] = static_cast<int32_t>(t / 5 % 4) - 1;
        const auto edit = [&](std::vector<T>* out, const char* name) {
          return reft_edit_cpu(dtype, h.data(), out->data(), slot.data(), U.data(), A.data(), b.data(), tokens, slots, rank, width, "silu",
                               "all", name);
        };
        if (edit(&expected, "portable") != nullptr || edit(&y, kernels.c_str()) != nullptr) return false;
        float largest = 1, error = 0;
        for (int64_t i = 0; i < tokens * width; ++i) {
          largest = std::fmax(largest, std::fabs(to_float(expected[i])));
          error = std::fmax(error, std::fabs(to_float(expected[i]) - to_float(y[i])));
        }
        if (!(error <= tolerance * largest)) {
          std::printf("%s, type %d, width %lld, rank %lld, %lld tokens: error %g of %g\n", kernels.c_str(), dtype,
                      static_cast<long long>(width), static_cast<long long>(rank), static_cast<long long>(tokens), error, largest);
          return false;
        }
      }
    }
  }
  return true;
}

// RED: a product and a sum, in float32 with or without a fused multiply-add.
template <class T>
static bool compare_red(int dtype, float tolerance, const std::string& kernels) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&](size_t count) {
    std::vector<T> out(count);
    for (T& value : out) from_float(normal(random), &value);
    return out;
  };
  for (int64_t width : {1, 3, 4, 5, 15, 16, 17, 63, 65, 513}) {
    const int64_t tokens = 19, slots = 2;
    std::vector<T> h = draw(tokens * width), scale = draw(slots * width), bias = draw(slots * width), y = h, expected = h;
    std::vector<int32_t> slot(tokens);
    for (int64_t t = 0; t < tokens; ++t) slot[t] = static_cast<int32_t>(t / 5 % 4) - 1;
    const auto edit = [&](std::vector<T>* out, const char* name) {
      return reft_red_cpu(dtype, h.data(), out->data(), slot.data(), scale.data(), bias.data(), tokens, slots, width, name);
    };
    if (edit(&expected, "portable") != nullptr || edit(&y, kernels.c_str()) != nullptr) return false;
    for (int64_t i = 0; i < tokens * width; ++i) {
      const float right = to_float(expected[i]), found = to_float(y[i]);
      if (!(std::fabs(right - found) <= tolerance * std::fmax(1.0f, std::fabs(right)))) {
        std::printf("RED, %s, type %d, width %lld: %g, expected %g\n", kernels.c_str(), dtype, static_cast<long long>(width), found, right);
        return false;
      }
    }
    if (std::memcmp(y.data(), h.data(), static_cast<size_t>(5 * width) * sizeof(T)) != 0) return false;  // the slots of -1
  }
  return true;
}

// All 65,536 words through a zero edit: widening and rounding are exact.
template <class T>
static bool round_trip(int dtype, const std::string& kernels) {
  const T zero = {};
  std::vector<T> h(65536), y(65536), bank(65536, zero);
  for (int i = 0; i < 65536; ++i) h[i].bits = static_cast<uint16_t>(i);
  const int32_t slot = 0;
  // A zero of its own for b; an infinity times a zero is a NaN in z, so that only finite words are fed.
  for (T& value : h) {
    if (!std::isfinite(to_float(value))) value = zero;
  }
  const char* error = reft_edit_cpu(dtype, h.data(), y.data(), &slot, bank.data(), bank.data(), &zero, 1, 1, 1, 65536, "", "all", kernels.c_str());
  for (int i = 0; i < 65536; ++i) {
    if (error != nullptr || to_float(y[i]) != to_float(h[i])) return false;
  }
  return true;
}

int main() {
  std::string names = reft_cpu_kernels();
  std::string joined;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    const std::string kernels = names.substr(begin, end - begin);
    begin = end + 1;
    if (!compare<float>(1, 3e-6f, kernels) || !compare<reft::Float16>(10, 1e-3f, kernels) || !compare<reft::BFloat16>(16, 8e-3f, kernels) ||
        !compare_red<float>(1, 3e-6f, kernels) || !compare_red<reft::Float16>(10, 1e-3f, kernels) ||
        !compare_red<reft::BFloat16>(16, 8e-3f, kernels) || !round_trip<reft::Float16>(10, kernels) || !round_trip<reft::BFloat16>(16, kernels)) {
      std::printf("%s differs\n", kernels.c_str());
      return 1;
    }
    joined += (joined.empty() ? "" : " and ") + kernels;
  }
  std::printf("%s agree\n", joined.c_str());
  return 0;
}
