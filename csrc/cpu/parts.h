// Sums over chunks of rows: every chunk adds into a part of its own, and the parts are added in order,
// so that no result depends on the number of threads.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace pk {

// How blocks of `block_rows` of some rows are split, where all rows of a call are `all_rows`: a function
// of the shapes alone.
struct Chunks {
  int64_t count, blocks_per_chunk;
};

Chunks chunks_of(int64_t rows, int64_t all_rows, int64_t block_rows, int64_t part_bytes);

// The first part becomes the sum over all parts [chunks, size], in order.
void sum_parts(float* parts, int64_t chunks, int64_t size);

// gradient[i, j] = from[i * row_step + j * column_step], rounded.
void write_gradient(
    const float* from, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
    Gradient gradient);

}  // namespace pk
