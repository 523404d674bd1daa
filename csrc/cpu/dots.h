// Sums of products of rows along the dimension in which both lie together: nothing is packed.
#pragma once

#include <algorithm>

#include "exp.h"
#include "lowrank.h"

namespace pk {

// `valid` elements, zeros beyond; `room` may be read.
template <typename T>
PK_INLINE vf load_as_float(const T* from, int64_t valid, int64_t room) {
  if (valid >= kLanes) return load(from);
  if (room < kLanes) return load_some(from, valid);
  constexpr vi kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return masked(load(from), kNumbers < static_cast<int32_t>(valid));
}

// The sum over the lanes of each of sixteen vectors, halves on halves: fewer additions, and fewer
// dependent ones, than one vector after another.
PK_INLINE vf sums_of(const vf (&v)[kLanes]) {
  vf eights[8], fours[4], twos[2];
  PK_UNROLL for (int i = 0; i < 8; ++i) {
    const vf a = v[i], b = v[i + 8];
    eights[i] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  PK_UNROLL for (int i = 0; i < 4; ++i) {
    const vf a = eights[i], b = eights[i + 4];
    fours[i] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  PK_UNROLL for (int i = 0; i < 2; ++i) {
    const vf a = fours[i], b = fours[i + 2];
    twos[i] =
        __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  const vf a = twos[0], b = twos[1];
  return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// line[i * kLanes + n] = sum_k v[i, k] w[n, k] for R rows of v, zero up to a whole vector, and up to
// sixteen rows of w, `rows` of which there are before the end of w; what lies beyond is undefined.
template <int R, typename T>
PK_INLINE void dots(
    const float* v, int64_t v_stride, const T* w, int64_t count, int64_t rows, float* line) {
  constexpr int C = kLanes / R;
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t n0 = 0; n0 < std::min(rows, kLanes); n0 += C) {
    const T* row[C];
    PK_UNROLL for (int c = 0; c < C; ++c) row[c] = w + std::min(n0 + c, rows - 1) * count;
    vf sum[kLanes] = {};
    for (int64_t k0 = 0; k0 < whole; k0 += kChain * kLanes) {
      vf acc[kLanes] = {};
      for (int64_t k = k0; k < std::min(whole, k0 + kChain * kLanes); k += kLanes) {
        vf x[R];
        PK_UNROLL for (int i = 0; i < R; ++i) x[i] = load(v + i * v_stride + k);
        PK_UNROLL for (int c = 0; c < C; ++c) {
          const vf weights = load(row[c] + k);
          PK_UNROLL for (int i = 0; i < R; ++i) acc[i * C + c] += x[i] * weights;
        }
      }
      PK_UNROLL for (int i = 0; i < kLanes; ++i) sum[i] += acc[i];
    }
    for (int64_t c = 0; whole < count && c < C; ++c) {
      const vf weights = load_some(row[c] + whole, count - whole);
      for (int i = 0; i < R; ++i) sum[i * C + c] += load(v + i * v_stride + whole) * weights;
    }
    float lanes[kLanes];
    store(lanes, sums_of(sum));
    PK_UNROLL for (int i = 0; i < R; ++i) std::copy_n(lanes + i * C, C, line + i * kLanes + n0);
  }
}

}  // namespace pk
