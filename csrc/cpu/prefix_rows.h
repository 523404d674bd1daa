// What happens to a tile of scores between its products, row by row in float32.
#pragma once

#include <cstdint>

#include "philox.h"
#include "vec.h"

namespace pk {

// Scores of a block of rows against a block of keys, and which of them count.
struct ScoreTile {
  float* scores;             // [rows, kDepth]
  int64_t rows, width;       // width: a multiple of kLanes, at most kDepth
  int64_t first_key;         // the tile's first column in the numbering of begin and end
  const int64_t* begin;      // [rows]: a row sees keys [begin, end)
  const int64_t* end;
  const uint32_t* key_keep;  // [width], all ones or zero, or null
  const uint32_t* keep;      // dropout, [rows, kDepth], all ones or zero, or null
  float keep_scale;
  float scale;               // of the softmax
};

// The running softmax of a block of rows.
struct Softmax {
  float* peak;   // [rows]: the largest scaled score so far
  float* total;  // [rows]: of exp(score - peak)
  float* acc;    // [rows, columns]: of exp(score - peak) value
  int64_t columns;
};

// Scores become exp(scale score - peak), dropped and scaled by dropout, zero where unseen; the running
// sums are brought to the new peaks, and the total is raised by what was kept or dropped alike.
void softmax_tile(const ScoreTile& tile, const Softmax& softmax);

// What the gradients of a block of rows need of forward.
struct RowTerms {
  const float* lse;     // [rows]
  const float* delta;   // [rows]: d_out out
  const float* d_lse;   // [rows]; apart from delta, beside which it would be rounded away
  const float* factor;  // [rows]: what the attention was multiplied by
};

// Scores become what multiplied the values (probabilities after dropout, times the factor), products
// [rows, kDepth] (of d_out and the values, or null) the gradient of what was scaled to the scores.
void gradient_tile(const ScoreTile& tile, const RowTerms& terms, float* products);

// totals[i] = sum_j p[i, j], dots[i] = sum_j p[i, j] products[i, j], of which dropout takes its part.
void weigh_tile(
    const ScoreTile& tile, const float* lse, const float* products, float* dots, float* totals);

// a[0, count) b[0, count).
float dot(const float* a, const float* b, int64_t count);
float dot(const bfloat16* a, const bfloat16* b, int64_t count);

}  // namespace pk
