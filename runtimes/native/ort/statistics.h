// Counts that tests read through the C interface.
#pragma once

#include <atomic>
#include <cstdint>

namespace reft {

struct Statistics {
  std::atomic<int64_t> calls{0}, in_place{0}, edited_rows{0}, threaded{0};
};

extern Statistics statistics;

}  // namespace reft
