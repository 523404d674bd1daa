// Who sees whom in prefix attention, how rows and keys are addressed, and what makes probabilities.
//
// All masks but key_mask are one interval of keys for each query. The query heads of one key head
// are rows: row r of group * queries has head r / queries and query r % queries, which is how
// [batch, heads, queries] lies in memory. A tile takes rows as they follow each other.
#pragma once

#include <cmath>

#include "prefix_panel.h"

namespace pk {

struct Interval {
  int first, last;  // past the last one
};

PK_DEVICE Interval seen_keys(const PrefixCall& call, int query) {
  const int keys = static_cast<int>(call.keys), window = static_cast<int>(call.window);
  const int position = query + keys - static_cast<int>(call.queries);
  Interval seen{0, keys};
  if (call.causal && position + 1 < keys) seen.last = position + 1;
  if (window) {
    if (!call.causal && position + window < keys) seen.last = position + window;
    if (position - window + 1 > 0) seen.first = position - window + 1;
  }
  if (call.segments) {
    int low = 0, high = static_cast<int>(call.segment_count);
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (call.segments[middle] <= query ? low : high) = middle;
    }
    if (call.segments[low] > seen.first) seen.first = call.segments[low];
    if (call.segments[low + 1] < seen.last) seen.last = call.segments[low + 1];
  }
  return seen;
}

// The rows of one key head of one sample.
struct KeyHead {
  int64_t batch, head;  // the head of keys
  int group, rows;      // its query heads, and their rows in all
  int64_t first_row;    // of [batch, heads, queries]
};

PK_DEVICE KeyHead key_head(const PrefixCall& call, int64_t batch, int64_t head) {
  const int64_t group = call.heads / call.kv_heads, rows = group * call.queries;
  return {
      batch, head, static_cast<int>(group), static_cast<int>(rows),
      (batch * call.kv_heads + head) * rows};
}

// Where a row of a key head starts, as offset from the tensor.
PK_DEVICE int64_t row_offset(
    const PrefixCall& call, const KeyHead& of, const Heads& heads, int row) {
  const int queries = static_cast<int>(call.queries);
  return of.batch * heads.batch + (of.head * of.group + row / queries) * heads.head +
         row % queries * heads.row;
}

template <typename T>
PK_DEVICE const T* keys_of(const Heads& heads, int64_t batch, int64_t head) {
  return static_cast<const T*>(heads.data) + batch * heads.batch + head * heads.head;
}

// A range of keys that rows are attended over: the prefix or the sequence.
template <typename T>
struct KeyRange {
  const T *key, *value;
  int64_t key_stride, value_stride;
  bool key_aligned, value_aligned;
  int count, length;
  bool bounded;         // each row sees its interval; else it sees all
  const uint8_t* mask;  // of the sample, or null
  int64_t first_group;  // of four columns of the dropout mask

  PK_DEVICE PanelLines<T> keys(int n) const {
    return {key + n * key_stride, nullptr, key_stride, count - n, length, key_aligned};
  }
  PK_DEVICE PanelLines<T> values(int n) const {
    return {value + n * value_stride, nullptr, value_stride, count - n, length, value_aligned};
  }
  // Whether key n is there for any row, and for a row of an interval.
  PK_DEVICE bool has(int n) const { return n < count && (!mask || mask[n]); }
  PK_DEVICE bool sees(int n, int first, int last) const {
    return has(n) && (!bounded || (n >= first && n < last));
  }
};

template <typename T>
PK_DEVICE KeyRange<T> key_range(
    const PrefixCall& call, int64_t batch, int64_t head, bool of_prefix) {
  const Heads& key = of_prefix ? call.prefix_key : call.key;
  const Heads& value = of_prefix ? call.prefix_value : call.value;
  return {
      keys_of<T>(key, batch, head),
      keys_of<T>(value, batch, head),
      key.row,
      value.row,
      key.aligned,
      value.aligned,
      static_cast<int>(of_prefix ? call.prefix : call.keys),
      static_cast<int>(call.head_size),
      !of_prefix && (call.causal || call.window || call.segments),
      of_prefix || !call.key_mask ? nullptr : call.key_mask + batch * call.keys,
      of_prefix ? 0 : (call.prefix + 3) / 4,
  };
}

// Groups of four columns in a row of the dropout mask: prefix and sequence each begin with one.
PK_DEVICE int64_t dropout_groups(const PrefixCall& call) {
  return (call.prefix + 3) / 4 + (call.keys + 3) / 4;
}

// Draw which of kKeys keys are kept for each of kRows rows, four to a byte.
template <int kRows, int kKeys>
PK_DEVICE void draw_keep(
    uint8_t* keep, const PrefixCall& call, int64_t first_row, int rows, int64_t first_group) {
  const uint64_t seed = static_cast<uint64_t>(*call.dropout.seed);
  const int64_t groups = dropout_groups(call);
  PK_NO_UNROLL for (int i = device::thread_x(); i < kRows * (kKeys / 4); i += kPrefixThreads) {
    const int row = i / (kKeys / 4), group = i % (kKeys / 4);
    keep[i] = row < rows ? static_cast<uint8_t>(keep_bits(
                               seed, call.dropout.threshold, first_row + row, groups,
                               first_group + group))
                         : 0;
  }
}
template <int kKeys>
PK_DEVICE bool is_kept(const uint8_t* keep, int row, int key) {
  return keep[row * (kKeys / 4) + key / 4] >> (key % 4) & 1;
}

// 16 bits take powers of two, whose scores are multiplied with log2 e; in float a change of base
// would cost accuracy.
template <typename T>
PK_DEVICE float base_factor() { return sizeof(T) == 4 ? 1.0f : 1.44269504088896341f; }
template <typename T>
PK_DEVICE float exponential(float x) { return sizeof(T) == 4 ? expf(x) : exp2f(x); }

// The natural logarithm of the sum of e^s; -inf of nothing.
template <typename T>
PK_DEVICE float log_sum(float max, float sum) {
  if (!(sum > 0.0f)) return -INFINITY;
  return sizeof(T) == 4 ? max + logf(sum) : (max + log2f(sum)) * 0.693147180559945309f;
}
// lse in the base of the scores; +inf, which makes p zero, of rows with nothing to see.
template <typename T>
PK_DEVICE float lse_of(float lse) { return lse == -INFINITY ? INFINITY : lse * base_factor<T>(); }

// The power of two next to x towards 0, without its sign: at least 2^-60, and 1 for 0. What x
// multiplies is divided by it before it is rounded to 16 bits, and multiplied with it afterwards,
// so that a small x does not underflow.
PK_DEVICE float power_of_two(float x) {
  if (x == 0.0f) return 1.0f;
  const float below = device::bits_to_float(device::float_to_bits(x) & 0x7F800000u);
  return below > 8.673617379884035e-19f ? below : 8.673617379884035e-19f;
}

}  // namespace pk
