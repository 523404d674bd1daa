#include "parts.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "vec.h"

namespace pk {
namespace {

constexpr int64_t kChunks = 16;
constexpr int64_t kFewestRows = 128;  // of a chunk: below, its part costs more than its products
constexpr int64_t kPartialBytes = int64_t{64} << 20;
constexpr int64_t kPiece = 4096;  // its sum stays in the first-level cache
constexpr int64_t kTile = 128;

// Elements [begin, end) of the first part become the sum over all parts, in order.
PK_CLONES void add_parts(float* parts, int64_t chunks, int64_t size, int64_t begin, int64_t end) {
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float* part = parts + chunk * size;
    for (int64_t i = begin; i < end; ++i) parts[i] += part[i];
  }
}

template <typename T>
void write_tile(
    const float* from, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
    int64_t stride, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      from_float(from[i * row_step + j * column_step], to + i * stride + j);
}

}  // namespace

Chunks chunks_of(int64_t rows, int64_t all_rows, int64_t block_rows, int64_t part_bytes) {
  // Without rows one chunk is left, whose sums are zero.
  const int64_t blocks = std::max<int64_t>(1, (rows + block_rows - 1) / block_rows);
  const int64_t fitting = part_bytes ? kPartialBytes / part_bytes : kChunks;
  const int64_t of_all = std::min({kChunks, fitting, all_rows / kFewestRows});
  const int64_t wanted = rows ? std::max<int64_t>(1, of_all * rows / all_rows) : 1;
  const int64_t each = (blocks + wanted - 1) / wanted;
  return {(blocks + each - 1) / each, each};
}

void sum_parts(float* parts, int64_t chunks, int64_t size) {
  if (chunks == 1 || size == 0) return;
  torch::stable::parallel_for(0, (size + kPiece - 1) / kPiece, 8, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      add_parts(parts, chunks, size, piece * kPiece, std::min(size, (piece + 1) * kPiece));
  });
}

void write_gradient(
    const float* from, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
    Gradient gradient) {
  if (!gradient.data) return;
  const int64_t across = (columns + kTile - 1) / kTile;
  const auto tiles = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t i = tile / across * kTile, j = tile % across * kTile;
      const auto write = [&](auto* to) {
        write_tile(
            from + i * row_step + j * column_step, row_step, column_step, std::min(kTile, rows - i),
            std::min(kTile, columns - j), columns, to + i * columns + j);
      };
      if (gradient.type == Type::kFloat32) {
        write(static_cast<float*>(gradient.data));
      } else {
        write(static_cast<bfloat16*>(gradient.data));
      }
    }
  };
  const int64_t count = (rows + kTile - 1) / kTile * across;
  if (count <= 2) {
    tiles(0, count);
  } else {
    torch::stable::parallel_for(0, count, 2, tiles);
  }
}

}  // namespace pk
