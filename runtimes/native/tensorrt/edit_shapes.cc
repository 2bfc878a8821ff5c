#include "tensorrt/edit_shapes.h"

#include <algorithm>
#include <cstdio>

namespace reft::trt {
namespace {

bool may_equal(Extent a, Extent b) { return a.low <= b.high && b.low <= a.high; }

bool known(Extent extent) { return extent.high != kUnbounded; }

// "[2, 1..128, ?]"
struct Shown {
  char text[200];
  explicit Shown(const Shape& shape) : Shown(shape, shape.rank) {}
  Shown(const Shape& shape, int rank) {
    size_t used = static_cast<size_t>(std::snprintf(text, sizeof text, "["));
    for (int i = 0; i < std::min(rank, kMaxDims); ++i) {
      const Extent d = shape.dims[i];
      const char* comma = i > 0 ? ", " : "";
      char* end = text + used;
      const size_t left = sizeof text - used;
      int written;
      if (!known(d)) {
        written = std::snprintf(end, left, "%s?", comma);
      } else if (d.low == d.high) {
        written = std::snprintf(end, left, "%s%lld", comma, static_cast<long long>(d.low));
      } else {
        written = std::snprintf(end, left, "%s%lld..%lld", comma, static_cast<long long>(d.low), static_cast<long long>(d.high));
      }
      used = std::min(used + static_cast<size_t>(written), sizeof text - 1);
    }
    std::snprintf(text + used, sizeof text - used, "]");
  }
};

bool tokens_fit(const Shape& h, const Shape& slot, char* reason, size_t capacity) {
  if (h.rank != 2 && h.rank != 3) {
    std::snprintf(reason, capacity, "h has shape %s, expected [tokens, D] or [batch, sequence, D]", Shown(h).text);
    return false;
  }
  bool leading = slot.rank == h.rank - 1;
  for (int i = 0; leading && i < slot.rank; ++i) leading = may_equal(slot.dims[i], h.dims[i]);
  if (!leading) {
    std::snprintf(reason, capacity, "slot has shape %s, expected %s, one slot per token of h %s", Shown(slot).text,
                  Shown(h, h.rank - 1).text, Shown(h).text);
    return false;
  }
  return true;
}

}  // namespace

bool lo_reft_fits(const Shape* inputs, char* reason, size_t capacity) {
  const Shape &h = inputs[kH], &U = inputs[kU], &A = inputs[kA], &b = inputs[kB];
  if (!tokens_fit(h, inputs[kSlot], reason, capacity)) return false;
  if (U.rank != 3 || !may_equal(U.dims[2], h.dims[h.rank - 1])) {
    std::snprintf(reason, capacity, "U has shape %s, expected [N, r, D] with D being that of h %s", Shown(U).text, Shown(h).text);
    return false;
  }
  if (A.rank != 3 || !may_equal(A.dims[0], U.dims[0]) || !may_equal(A.dims[1], U.dims[1]) || !may_equal(A.dims[2], U.dims[2])) {
    std::snprintf(reason, capacity, "A has shape %s, expected %s, the shape of U", Shown(A).text, Shown(U).text);
    return false;
  }
  if (b.rank != 2 || !may_equal(b.dims[0], U.dims[0]) || !may_equal(b.dims[1], U.dims[1])) {
    std::snprintf(reason, capacity, "b has shape %s, expected %s, [N, r] of U %s", Shown(b).text, Shown(U, 2).text, Shown(U).text);
    return false;
  }
  if (known(U.dims[0]) && U.dims[0].low < 1) {
    std::snprintf(reason, capacity, "U has shape %s, expected N >= 1 slots; bind a bank of zeros [1, 1, D] for no edit", Shown(U).text);
    return false;
  }
  if (known(U.dims[1]) && (U.dims[1].low < 1 || U.dims[1].high > kPluginMaxRank)) {
    std::snprintf(reason, capacity, "U has shape %s, expected a rank r from 1 to %lld", Shown(U).text,
                  static_cast<long long>(kPluginMaxRank));
    return false;
  }
  return true;
}

bool red_fits(const Shape* inputs, char* reason, size_t capacity) {
  const Shape &h = inputs[kH], &scale = inputs[kScale], &bias = inputs[kBias];
  if (!tokens_fit(h, inputs[kSlot], reason, capacity)) return false;
  if (scale.rank != 2 || !may_equal(scale.dims[1], h.dims[h.rank - 1])) {
    std::snprintf(reason, capacity, "scale has shape %s, expected [N, D] with D being that of h %s", Shown(scale).text, Shown(h).text);
    return false;
  }
  if (bias.rank != 2 || !may_equal(bias.dims[0], scale.dims[0]) || !may_equal(bias.dims[1], scale.dims[1])) {
    std::snprintf(reason, capacity, "bias has shape %s, expected %s, the shape of scale", Shown(bias).text, Shown(scale).text);
    return false;
  }
  if (known(scale.dims[0]) && scale.dims[0].low < 1) {
    std::snprintf(reason, capacity, "scale has shape %s, expected N >= 1 slots; bind a bank [1, D] of ones, and of zeros for bias, for no edit",
                  Shown(scale).text);
    return false;
  }
  return true;
}

}  // namespace reft::trt
