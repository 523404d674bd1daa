// The keep mask of dropout: Philox-4x32-10, bit for bit what peft_kernels/core/rng.py specifies.
//
// Element (row, k) takes word k % 4 of counter row * ceil(cols / 4) + k / 4; it is kept iff the word
// reaches the threshold. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace pk {

struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;
};

constexpr int64_t kDepth = 128;  // columns of a block of an activation

// Write keep[rows.count, kDepth] for columns [first_column, first_column + kDepth) of an activation of
// `columns` columns: 0xFFFFFFFF for kept, 0 for dropped; what lies beyond `columns` is undefined.
// first_column is a multiple of 4.
void draw_keep(
    const Dropout& dropout, const Rows& rows, int64_t columns, int64_t first_column, uint32_t* keep);

}  // namespace pk
