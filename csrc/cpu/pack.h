// The small factors brought into the layout that the products of lowrank.h read.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "aligned.h"
#include "lowrank.h"

namespace pk {

// How many elements `packed` makes of one matrix.
PK_INLINE int64_t packed_size(int64_t rows, int64_t stride) { return round_up(rows, 2) * stride; }

// P or Q of K, [rows, columns] with column stride `stride`, zeros beyond: element (i, j) is
// from[i * row_step + j * column_step]. Of many such matrices at `from`, those that `numbers` names.
template <typename K>
Buffer<typename K::Work> packed(
    const void* from, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
    int64_t stride, const std::vector<int64_t>& numbers = {0}) {
  using Work = typename K::Work;
  constexpr int64_t kHigh = 32, kWide = 256;
  const int64_t height = round_up(rows, 2), across = (stride + kWide - 1) / kWide;
  const int64_t size = packed_size(rows, stride), each = (height + kHigh - 1) / kHigh * across;
  const int64_t matrices = static_cast<int64_t>(numbers.size());
  const int64_t count = each * matrices, total = size * matrices;
  auto all = uninitialized<Work>(total);
  const auto tiles = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t place = at / each, tile = at % each;
      const auto* in = static_cast<const typename K::Element*>(from) + numbers[place] * rows * columns;
      Work* to = all.get() + place * size;
      const int64_t i0 = tile / across * kHigh, j0 = tile % across * kWide;
      const int64_t i1 = std::min(height, i0 + kHigh), j1 = std::min(stride, j0 + kWide);
      const int64_t filled = std::max(j0, std::min(columns, j1));
      for (int64_t i = i0; i < i1; i += 2) {
        const auto* row = in + i * row_step;
        const int64_t next = i + 1 < rows ? row_step : 0;
        for (int64_t j = j0; j < filled; ++j) {
          to[K::at(i, j, stride)] = K::work(row[j * column_step]);
          to[K::at(i + 1, j, stride)] = K::work(row[j * column_step + next]);
        }
        for (int64_t j = filled; j < j1; ++j)
          to[K::at(i, j, stride)] = to[K::at(i + 1, j, stride)] = Work{};
        for (int64_t j = j0; i + 1 == rows && j < j1; ++j) to[K::at(i + 1, j, stride)] = Work{};
      }
    }
  };
  if (total <= kHigh * kWide) {
    tiles(0, count);
  } else {
    torch::stable::parallel_for(0, count, 1, tiles);
  }
  return all;
}

}  // namespace pk
