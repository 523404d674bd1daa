// The small factors brought into the layout that the products of lowrank.h read.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "aligned.h"
#include "lowrank.h"

namespace pk {

constexpr int64_t kFew = 8192;  // elements that one thread packs alone

// How many elements P or Q of one matrix has.
PK_INLINE int64_t packed_size(int64_t rows, int64_t stride) { return round_up(rows, 2) * stride; }

// Rows [i0, i1) of columns [j0, j1) of a matrix as P or Q, i0 even, to `to` from column j0 on.
template <typename K>
PK_INLINE void pack_tile(
    const typename K::Element* from, int64_t row_step, int64_t column_step, int64_t i0, int64_t i1,
    int64_t j0, int64_t j1, int64_t stride, typename K::Work* to) {
  constexpr int64_t kStep = 8;  // rows of `from` whose lines stay in the first-level cache
  const auto pairs = [&](int64_t i, int64_t j, int64_t count, int64_t below) PK_INLINE_LAMBDA {
    const auto* in = from + i * row_step + j * column_step;
    auto *even = to + K::at(i, j - j0, stride), *odd = to + K::at(i + 1, j - j0, stride);
    for (int64_t n = 0; n < count; ++n) {
      even[K::at(0, n, stride)] = K::work(in[n * column_step]);
      odd[K::at(0, n, stride)] = K::work(in[n * column_step + below]);
    }
  };
  const int64_t whole = i1 - i1 % 2;
  for (int64_t j = j0; j < j1; j += kStep) {
    const int64_t count = std::min(kStep, j1 - j);
    if (row_step == 1 && count == kStep) {
      for (int64_t i = i0; i < whole; i += 2) pairs(i, j, kStep, 1);
    } else {
      for (int64_t i = i0; i < whole; i += 2) pairs(i, j, count, row_step);
    }
  }
  for (int64_t j = j0; whole < i1 && j < j1; ++j) {  // the last row of an odd number, and zeros below
    to[K::at(whole, j - j0, stride)] = K::work(from[whole * row_step + j * column_step]);
    to[K::at(whole + 1, j - j0, stride)] = typename K::Work{};
  }
}

// P of K or, with `width` kColumns, Q: a matrix [rows, columns] whose element (i, j) is
// from[i * row_step + j * column_step], in tiles of `width` columns one after the other, zeros up to
// `stride` columns. Of many such matrices at `from`, those that `numbers` names.
template <typename K>
Buffer<typename K::Work> packed(
    const void* from, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
    int64_t stride, int64_t width, const std::vector<int64_t>& numbers = {0}) {
  using Work = typename K::Work;
  // What one task packs: long where elements lie side by side, and within a tile.
  const int64_t high = row_step == 1 ? 256 : 32;
  const int64_t wide = std::max<int64_t>(1, std::min<int64_t>(width, row_step == 1 ? 32 : 256));
  const int64_t height = round_up(rows, 2), across = (stride + wide - 1) / wide;
  const int64_t size = packed_size(rows, stride), each = (height + high - 1) / high * across;
  const int64_t matrices = static_cast<int64_t>(numbers.size());
  const int64_t count = each * matrices, total = size * matrices;
  auto all = uninitialized<Work>(total);
  const auto tasks = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t place = at / each, task = at % each;
      const auto* in = static_cast<const typename K::Element*>(from) + numbers[place] * rows * columns;
      const int64_t i0 = task / across * high, i1 = std::min(height, i0 + high);
      const int64_t j0 = task % across * wide, j1 = std::min(stride, j0 + wide);
      const int64_t filled = std::max(j0, std::min(columns, j1));
      const int64_t tile = j0 / width * width;
      Work* to = all.get() + place * size + tile * height + K::at(0, j0 - tile, width);
      pack_tile<K>(in, row_step, column_step, i0, std::min(rows, i1), j0, filled, width, to);
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = filled; j < j1; ++j) to[K::at(i, j - j0, width)] = Work{};
    }
  };
  if (total <= kFew) {
    tasks(0, count);
  } else {
    torch::stable::parallel_for(0, count, 1, tasks);
  }
  return all;
}

// P of K: [rows, ranks].
template <typename K>
Buffer<typename K::Work> packed_p(
    const void* from, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
    int64_t stride, const std::vector<int64_t>& numbers = {0}) {
  return packed<K>(from, row_step, column_step, rows, columns, stride, stride, numbers);
}

// Q of K: tiles [ranks, kColumns].
template <typename K>
Buffer<typename K::Work> packed_q(
    const void* from, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
    int64_t stride, const std::vector<int64_t>& numbers = {0}) {
  return packed<K>(from, row_step, column_step, rows, columns, stride, kColumns, numbers);
}

}  // namespace pk
