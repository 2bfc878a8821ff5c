// Rows in plain C++: four lanes that a compiler turns into whatever vectors its target has.

#include "cpu/rows.h"

namespace reft {
namespace {

struct Portable {
  struct Register {
    float lane[4];
  };
  using Sum = Register;
  static constexpr int kLanes = 4, kRanks = 2, kColumns = 2;

  static inline Register zero() { return {}; }
  static inline Register broadcast(float x) { return {{x, x, x, x}}; }
  static inline Register multiply_add(const Register& a, const Register& b, const Register& c) {
    Register out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return out;
  }
  static inline Register add(const Register& a, const Register& b) {
    Register out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = a.lane[i] + b.lane[i];
    return out;
  }
  static inline float total(const Register& a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }
  template <class T>
  static inline Register load(const T* p) {
    return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  static inline Register load_some(const T* p, int count) {
    Register out = {};
    for (int i = 0; i < count; ++i) out.lane[i] = to_float(p[i]);
    return out;
  }
  template <class T>
  static inline void store(T* p, const Register& a) {
    for (int i = 0; i < kLanes; ++i) from_float(a.lane[i], p + i);
  }
  template <class T>
  static inline void store_some(T* p, const Register& a, int count) {
    for (int i = 0; i < count; ++i) from_float(a.lane[i], p + i);
  }
};

}  // namespace

const RowKernels kPortableRows = row_kernels_of<Portable>("portable");

}  // namespace reft
