// Dropout of a whole activation by a seed, for products that a library makes of it.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace pk {

// y = keep * x * factor, y [rows, columns] contiguous; keep as philox.h draws it.
struct Drop {
  Type type;
  int64_t rows, columns;
  Matrix x;
  float factor;  // 1 / (1 - p)
  uint64_t seed;
  uint32_t threshold;
  void* y;
};

void drop(const Drop& call);

}  // namespace pk
