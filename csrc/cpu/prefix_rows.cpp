#include "prefix_rows.h"

#include <algorithm>
#include <limits>

#include "exp.h"

namespace pk {
namespace {

template <typename T>
PK_INLINE float dot_of(const T* a, const T* b, int64_t count) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += to_float(a[j + k]) * to_float(b[j + k]);
  for (; j < count; ++j) lanes[j % kLanes] += to_float(a[j]) * to_float(b[j]);
  return sum_of(load(lanes));
}

constexpr float kNothing = -std::numeric_limits<float>::infinity();

PK_INLINE vi load_bits(const uint32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Columns [begin, end) of a row, and the whole vectors around them.
struct Span {
  int64_t begin, end, first, last;

  PK_INLINE Span(const ScoreTile& tile, int64_t row) {
    begin = std::clamp<int64_t>(tile.begin[row] - tile.first_key, 0, tile.width);
    end = std::clamp<int64_t>(tile.end[row] - tile.first_key, 0, tile.width);
    first = begin / kLanes * kLanes;
    last = begin < end ? round_up(end, kLanes) : first;
  }
  // Whether every column of a vector is seen, key mask aside.
  PK_INLINE bool covers(int64_t column) const { return column >= begin && column + kLanes <= end; }

  PK_INLINE vi seen(const ScoreTile& tile, int64_t column) const {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vi mask = (lanes >= static_cast<int32_t>(begin - column)) &
                    (lanes < static_cast<int32_t>(end - column));
    return tile.key_keep ? mask & load_bits(tile.key_keep + column) : mask;
  }
};

PK_INLINE void clear_unseen(const ScoreTile& tile, const Span& span, float* row) {
  std::fill(row, row + span.first, 0.0f);
  std::fill(row + span.last, row + tile.width, 0.0f);
}

PK_INLINE vf dropped(const ScoreTile& tile, int64_t row, int64_t column, vf value) {
  return masked(value * tile.keep_scale, load_bits(tile.keep + row * kDepth + column));
}

// exp(scale score - lse). A row that sees one key has exp(0) here: its score is rounded as forward
// rounded it. The rounding of the difference is made up for: of the largest it is all the error.
PK_INLINE vf probability(const ScoreTile& tile, vf score, float lse) {
  const vf x = product(score, tile.scale), difference = x - lse;
  const vf lost = x - (difference + lse);
  const vf p = exp(difference);
  return p + p * lost;
}

}  // namespace

PK_CLONES void softmax_tile(const ScoreTile& tile, const Softmax& softmax) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Span span(tile, i);
    float* row = tile.scores + i * kDepth;
    clear_unseen(tile, span, row);
    if (span.first == span.last) continue;
    const float before = softmax.peak[i];
    vf peaks = splat(before);
    for (int64_t j = span.first; j < span.last; j += kLanes) {
      vf x = load(row + j) * tile.scale;
      if (tile.key_keep || !span.covers(j)) x = select(span.seen(tile, j), x, splat(kNothing));
      store(row + j, x);
      peaks = larger(x, peaks);
    }
    const float peak = max_of(peaks), base = peak == kNothing ? 0.0f : peak;
    vf sums = {};
    for (int64_t j = span.first; j < span.last; j += kLanes) {
      vf p = exp(load(row + j) - base);
      sums += p;
      if (tile.keep) p = dropped(tile, i, j, p);
      store(row + j, p);
    }
    if (peak != before) {
      const float factor = exp(splat(before - base))[0];
      softmax.peak[i] = peak;
      softmax.total[i] *= factor;
      float* acc = softmax.acc + i * softmax.columns;
      for (int64_t j = 0; j < softmax.columns; j += kLanes) store(acc + j, load(acc + j) * factor);
    }
    softmax.total[i] += sum_of(sums);
  }
}

PK_CLONES void gradient_tile(const ScoreTile& tile, const RowTerms& terms, float* products) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Span span(tile, i);
    float* row = tile.scores + i * kDepth;
    float* gradient = products ? products + i * kDepth : nullptr;
    clear_unseen(tile, span, row);
    if (gradient) clear_unseen(tile, span, gradient);
    const float lse = terms.lse[i], delta = terms.delta[i], d_lse = terms.d_lse[i];
    const float factor = terms.factor[i];
    for (int64_t j = span.first; j < span.last; j += kLanes) {
      vf p = probability(tile, load(row + j), lse) * factor;
      if (tile.key_keep || !span.covers(j)) p = masked(p, span.seen(tile, j));
      if (gradient) {
        vf dp = load(gradient + j);
        if (tile.keep) dp = dropped(tile, i, j, dp);
        store(gradient + j, p * tile.scale * (dp - delta + d_lse));
      }
      store(row + j, tile.keep ? dropped(tile, i, j, p) : p);
    }
  }
}

PK_CLONES void weigh_tile(
    const ScoreTile& tile, const float* lse, const float* products, float* dots, float* totals) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Span span(tile, i);
    vf dot = {}, total = {};
    for (int64_t j = span.first; j < span.last; j += kLanes) {
      vf p = probability(tile, load(tile.scores + i * kDepth + j), lse[i]);
      if (tile.key_keep || !span.covers(j)) p = masked(p, span.seen(tile, j));
      total += p;
      vf dp = load(products + i * kDepth + j);
      if (tile.keep) dp = dropped(tile, i, j, dp);
      dot += p * dp;
    }
    dots[i] = sum_of(dot);
    totals[i] = sum_of(total);
  }
}

PK_CLONES float dot(const float* a, const float* b, int64_t count) { return dot_of(a, b, count); }

PK_CLONES float dot(const bfloat16* a, const bfloat16* b, int64_t count) {
  return dot_of(a, b, count);
}

}  // namespace pk
