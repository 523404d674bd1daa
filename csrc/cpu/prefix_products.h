// C (+)= A B on tiles that lie in the cache.
//
// Operands consist of 32-bit words: a float, or two bfloat16 that are neighbours along the reduction,
// which one instruction multiplies and adds. Both are handled as float in memory and never computed
// with as such. A is read by strides, so that a tile serves plain and transposed; B lies in panels of
// kPanel columns, [panel][depth][kPanel].
#pragma once

#include <cstdint>

#include "vec.h"
#include "vector_level.h"

namespace pk {

constexpr int64_t kPanel = 2 * kLanes;

struct Product {
  const float* a;            // word (i, r) at i * a_row + r * a_step; one of the two is 1
  int64_t a_row, a_step;
  const float* b;
  int64_t b_panel;           // words from one panel to the next
  float* c;
  int64_t c_stride;
  int64_t rows;              // a multiple of kRowStep
  int64_t columns;           // a multiple of kLanes
  int64_t depth;             // words
  bool fresh;                // C is written, not added to
};

constexpr int64_t kRowStep = 8;

void multiply(const Product& product);

#ifdef PK_NATIVE
// The same on pairs of bfloat16, where native_bfloat16().
PK_NATIVE void multiply_pairs(const Product& product);
#endif

}  // namespace pk
