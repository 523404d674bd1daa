// One tile of a matrix product by one block of threads: rows [kRows, depth] times columns
// [kColumns, depth] transposed, in float, over a pipeline of asynchronous copies.
//
// Operands have a unit stride in one dimension, kept in shared memory as it lies in global memory:
// along the depth, or across it. 16-byte pieces that are aligned and whole are copied
// asynchronously, others by elements, and what lies outside the matrix is zero. 16-bit types
// multiply on tensor cores; float by multiply-adds, so that its sums are exact to float.
#pragma once

#include "philox.h"
#include "types.h"

namespace pk {

// A matrix of `lines`, each of `length` neighbouring elements; line i starts at i * stride, or
// where `order` is not null, at order[i] * stride.
template <typename T>
struct Lines {
  const T* data;
  int64_t stride, lines, length;
  const int64_t* order;
  bool aligned;  // every line starts at a multiple of 16 bytes

  PK_DEVICE int64_t line(int64_t i) const { return order ? order[i] : i; }
};

template <typename T>
Lines<T> lines_of(
    const void* data, int64_t stride, int64_t lines, int64_t length,
    const int64_t* order = nullptr) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
  const bool aligned = is_aligned(data, 16) && bytes % 16 == 0;
  return {static_cast<const T*>(data), stride, lines, length, order, aligned};
}

// Lines in shared memory stand 16 bytes further apart than they are long: the eight rows that one
// ldmatrix reads then fall into different banks.
template <typename T>
PK_HOST_DEVICE constexpr int padded(int length) { return length + kPackOf16<T>; }

// Bring lines [first, first + kLines), elements [begin, begin + kLength) to `shared`.
template <int kLines, int kLength, int kThreads, typename T>
PK_DEVICE void load_lines(T* shared, const Lines<T>& from, int64_t first, int64_t begin) {
  constexpr int kPack = kPackOf16<T>, kPerLine = kLength / kPack;
  constexpr int kPieces = kLines * kPerLine / kThreads;
  static_assert(kLength % kPack == 0 && kThreads % kPerLine == 0);
  static_assert(kLines * kPerLine % kThreads == 0);
  const int line0 = device::thread_x() / kPerLine, offset = device::thread_x() % kPerLine * kPack;
  T* target = shared + line0 * padded<T>(kLength) + offset;
  if (from.aligned && first + kLines <= from.lines && begin + kLength <= from.length) {
    PK_UNROLL for (int i = 0; i < kPieces; ++i) {
      constexpr int kStep = kThreads / kPerLine;
      const int64_t line = from.line(first + line0 + i * kStep);
      device::cp_async_16(
          target + i * kStep * padded<T>(kLength), from.data + line * from.stride + begin + offset,
          true);
    }
    return;
  }
  const int64_t left = from.length - begin - offset;
  PK_NO_UNROLL for (int i = 0; i < kPieces; ++i) {
    const int64_t line = first + line0 + i * (kThreads / kPerLine);
    const bool inside = line < from.lines && left > 0;
    const T* source = from.data;
    if (inside) source += from.line(line) * from.stride + begin + offset;
    if (from.aligned && (left >= kPack || !inside)) {
      device::cp_async_16(target, source, inside);
    } else {
      Pack<T, kPack> pack;
      PK_UNROLL for (int j = 0; j < kPack; ++j)
        pack[j] = inside && j < left ? source[j] : zero<T>();
      store_pack(target, pack);
    }
    target += kThreads / kPerLine * padded<T>(kLength);
  }
}

// Set to zero what dropout drops of such lines; `columns` is the length of a whole line.
template <int kLines, int kLength, int kThreads, typename T>
PK_DEVICE void drop_in_lines(
    T* shared, const Lines<T>& from, int64_t first, int64_t begin, int64_t columns,
    const Dropout& dropout) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const int64_t groups = (columns + 3) / 4;
  PK_NO_UNROLL for (int i = device::thread_x(); i < kLines * (kLength / 4); i += kThreads) {
    const int group = i % (kLength / 4);
    const int64_t line = first + i / (kLength / 4);
    if (line >= from.lines) continue;
    const uint32_t keep =
        keep_bits(seed, dropout.threshold, from.line(line), groups, begin / 4 + group);
    T* four = shared + i / (kLength / 4) * padded<T>(kLength) + 4 * group;
    PK_UNROLL for (int j = 0; j < 4; ++j)
      if (!(keep >> j & 1)) four[j] = zero<T>();
  }
}

struct SameRow {
  PK_DEVICE int64_t operator()(int64_t row) const { return row; }
};

// kDepthAtOnce: how much of the depth is unrolled, and in float summed for itself.
template <
    int kRows_, int kColumns_, int kDepth_, int kWarpRows_, int kWarpColumns_,
    int kDepthAtOnce_ = kDepth_>
struct Shape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_;
  static constexpr int kDepthAtOnce = kDepthAtOnce_;
  static_assert(kDepth % kDepthAtOnce == 0);
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
};

// The accumulators of a tile, held by the threads of a block; visit() names each by its place.
// kRowsAlong, kColumnsAlong: the operand's unit stride is along the depth.
template <typename T, typename S, bool kRowsAlong, bool kColumnsAlong>
class Product {
  static constexpr int kTilesM = S::kRows / S::kWarpRows / 16;
  static constexpr int kTilesN = S::kColumns / S::kWarpColumns / 8;
  static_assert(kTilesM > 0 && kTilesN > 0 && kTilesN % 2 == 0 && S::kDepthAtOnce % 16 == 0);

  float sum_[kTilesM][kTilesN][4];

  PK_DEVICE static int first_row() { return device::warp() / S::kWarpColumns * kTilesM * 16; }
  PK_DEVICE static int first_column() { return device::warp() % S::kWarpColumns * kTilesN * 8; }

 public:
  // Rows of a thread, and how many neighbouring lanes share them where kWarpColumns is one.
  static constexpr int kSlots = 2 * kTilesM, kRowLanes = 4;

  PK_DEVICE void clear() {
    PK_UNROLL for (int m = 0; m < kTilesM; ++m)
      PK_UNROLL for (int n = 0; n < kTilesN; ++n)
        PK_UNROLL for (int i = 0; i < 4; ++i) sum_[m][n][i] = 0.0f;
  }

  PK_DEVICE void multiply(const T* rows, const T* columns) {
    // Lane 8 q + r gives row r of the q-th matrix.
    const int r = device::lane() % 8, q = device::lane() / 8;
    // Where not all is unrolled, loads far ahead take no registers from the sums.
    PK_NO_UNROLL for (int k0 = 0; k0 < S::kDepth; k0 += S::kDepthAtOnce)
      PK_UNROLL for (int k = k0; k < k0 + S::kDepthAtOnce; k += 16) {
        uint32_t a[kTilesM][4];
        PK_UNROLL for (int m = 0; m < kTilesM; ++m) {
          const int row = first_row() + m * 16;
          if constexpr (kRowsAlong)
            device::ldmatrix_x4(
                a[m], rows + (row + q % 2 * 8 + r) * padded<T>(S::kDepth) + k + q / 2 * 8);
          else
            device::ldmatrix_x4_transposed(
                a[m], rows + (k + q / 2 * 8 + r) * padded<T>(S::kRows) + row + q % 2 * 8);
        }
        PK_UNROLL for (int n = 0; n < kTilesN; n += 2) {
          const int column = first_column() + n * 8;
          uint32_t four[4];
          if constexpr (kColumnsAlong)
            device::ldmatrix_x4(
                four, columns + (column + q / 2 * 8 + r) * padded<T>(S::kDepth) + k + q % 2 * 8);
          else
            device::ldmatrix_x4_transposed(
                four, columns + (k + q % 2 * 8 + r) * padded<T>(S::kColumns) + column + q / 2 * 8);
          const uint32_t left[2] = {four[0], four[1]}, right[2] = {four[2], four[3]};
          PK_UNROLL for (int m = 0; m < kTilesM; ++m) {
            device::mma_16x8x16<T>(sum_[m][n], a[m], left);
            device::mma_16x8x16<T>(sum_[m][n + 1], a[m], right);
          }
        }
      }
  }

  // f(slot, column, float&) for each accumulator of this thread: slot says which of its rows, the
  // column is within the tile.
  template <typename F>
  PK_DEVICE void visit_slots(F f) {
    visit_with(*this, [&](int slot, int column, float& sum, float&) { f(slot, column, sum); });
  }
  // f(slot, column, float&, float&) of this and another product's.
  template <typename F>
  PK_DEVICE void visit_with(Product& other, F f) {
    const int t = device::lane() % 4;
    PK_UNROLL for (int m = 0; m < kTilesM; ++m)
      PK_UNROLL for (int n = 0; n < kTilesN; ++n)
        PK_UNROLL for (int i = 0; i < 4; ++i)
          f(m * 2 + i / 2, first_column() + n * 8 + 2 * t + i % 2, sum_[m][n][i],
            other.sum_[m][n][i]);
  }
  PK_DEVICE static int row_of(int slot) {
    return first_row() + slot / 2 * 16 + device::lane() / 4 + slot % 2 * 8;
  }

  // f(row, column, float&) likewise, the row within the tile.
  template <typename F>
  PK_DEVICE void visit(F f) {
    visit_slots([&](int slot, int column, float& sum) { f(row_of(slot), column, sum); });
  }

  // Set to zero what dropout drops of a matrix of `columns` columns, this tile at (row0, column0);
  // row_of(i) is the row of the mask that row i of the matrix has.
  template <typename RowOf = SameRow>
  PK_DEVICE void drop(
      int64_t row0, int64_t column0, int64_t columns, const Dropout& dropout, RowOf row_of = {}) {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const int g = device::lane() / 4, t = device::lane() % 4;
    // Two lanes share the four columns that one call draws: each draws one of their two rows.
    PK_UNROLL for (int m = 0; m < kTilesM; ++m)
      PK_UNROLL for (int n = 0; n < kTilesN; ++n) {
        const int64_t row = row_of(row0 + first_row() + m * 16 + g + t % 2 * 8);
        const int64_t column = column0 + first_column() + n * 8 + t / 2 * 4;
        const uint32_t own =
            keep_bits(seed, dropout.threshold, row, (columns + 3) / 4, column / 4);
        const uint32_t other = device::shuffle_xor(own, 1);
        const uint32_t upper = (t % 2 ? other : own) >> (t % 2 * 2);
        const uint32_t lower = (t % 2 ? own : other) >> (t % 2 * 2);
        if (!(upper & 1)) sum_[m][n][0] = 0.0f;
        if (!(upper & 2)) sum_[m][n][1] = 0.0f;
        if (!(lower & 1)) sum_[m][n][2] = 0.0f;
        if (!(lower & 2)) sum_[m][n][3] = 0.0f;
      }
  }
};

// float: a thread has eight rows and some columns, each kThreadRows or kThreadColumns apart.
template <typename S, bool kRowsAlong, bool kColumnsAlong>
class Product<float, S, kRowsAlong, kColumnsAlong> {
  static constexpr int kN = S::kRows * S::kColumns / S::kThreads / 8;
  static constexpr int kThreadColumns = S::kColumns / kN, kThreadRows = S::kRows / 8;
  static_assert(kThreadRows * kThreadColumns == S::kThreads && kThreadColumns % 4 == 0);

  // What the additions of whole pieces have rounded off so far, by Kahan.
  static constexpr bool kCompensated = S::kDepthAtOnce == S::kDepth;

  float sum_[8][kN];
  float lost_[kCompensated ? 8 : 1][kCompensated ? kN : 1];

  PK_DEVICE static int first_row() { return device::thread_x() / kThreadColumns; }
  PK_DEVICE static int first_column() { return device::thread_x() % kThreadColumns; }

 public:
  static constexpr int kSlots = 8, kRowLanes = kThreadColumns;

  PK_DEVICE void clear() {
    PK_UNROLL for (int m = 0; m < 8; ++m)
      PK_UNROLL for (int n = 0; n < kN; ++n) {
        sum_[m][n] = 0.0f;
        if constexpr (kCompensated) lost_[m][n] = 0.0f;
      }
  }

  // A piece's products are summed before they are added: one chain over all of the depth would
  // round too often. In several pieces each product is rounded with its sum: attention, which has
  // them and few of them, is held to more than the other products are. These are added with what
  // the additions before have lost.
  PK_DEVICE void multiply(const float* rows, const float* columns) {
    PK_NO_UNROLL for (int k0 = 0; k0 < S::kDepth; k0 += S::kDepthAtOnce) {
      float part[8][kN] = {};
      PK_UNROLL for (int k = k0; k < k0 + S::kDepthAtOnce; ++k) {
        float b[kN];
        PK_UNROLL for (int n = 0; n < kN; ++n) {
          const int column = first_column() + n * kThreadColumns;
          b[n] = columns[kColumnsAlong ? column * padded<float>(S::kDepth) + k
                                       : k * padded<float>(S::kColumns) + column];
        }
        PK_UNROLL for (int m = 0; m < 8; ++m) {
          const int row = first_row() + m * kThreadRows;
          const float a = rows[kRowsAlong ? row * padded<float>(S::kDepth) + k
                                          : k * padded<float>(S::kRows) + row];
          PK_UNROLL for (int n = 0; n < kN; ++n)
            part[m][n] = S::kDepthAtOnce < S::kDepth
                             ? device::multiply_add(a, b[n], part[m][n])
                             : part[m][n] + a * b[n];
        }
      }
      PK_UNROLL for (int m = 0; m < 8; ++m)
        PK_UNROLL for (int n = 0; n < kN; ++n) {
          if constexpr (kCompensated) {
            const float added = part[m][n] - lost_[m][n], sum = sum_[m][n] + added;
            lost_[m][n] = (sum - sum_[m][n]) - added;
            sum_[m][n] = sum;
          } else {
            sum_[m][n] += part[m][n];
          }
        }
    }
  }

  template <typename F>
  PK_DEVICE void visit_slots(F f) {
    visit_with(*this, [&](int slot, int column, float& sum, float&) { f(slot, column, sum); });
  }
  template <typename F>
  PK_DEVICE void visit_with(Product& other, F f) {
    PK_UNROLL for (int m = 0; m < 8; ++m)
      PK_UNROLL for (int n = 0; n < kN; ++n)
        f(m, first_column() + n * kThreadColumns, sum_[m][n], other.sum_[m][n]);
  }
  PK_DEVICE static int row_of(int slot) { return first_row() + slot * kThreadRows; }

  template <typename F>
  PK_DEVICE void visit(F f) {
    visit_slots([&](int slot, int column, float& sum) { f(row_of(slot), column, sum); });
  }

  template <typename RowOf = SameRow>
  PK_DEVICE void drop(
      int64_t row0, int64_t column0, int64_t columns, const Dropout& dropout, RowOf row_of = {}) {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    static_assert(kN == 4);
    const int within = device::lane() % 4;
    // Four lanes share the four columns that one call draws: each draws one of their four groups.
    PK_UNROLL for (int m = 0; m < 8; ++m) {
      const int64_t row = row_of(row0 + first_row() + m * kThreadRows);
      const int64_t column = column0 + first_column() - within + within * kThreadColumns;
      const uint32_t own = keep_bits(seed, dropout.threshold, row, (columns + 3) / 4, column / 4);
      PK_UNROLL for (int n = 0; n < 4; ++n) {
        const uint32_t keep = device::shuffle(own, device::lane() - within + n);
        if (!(keep >> within & 1)) sum_[m][n] = 0.0f;
      }
    }
  }
};

// A tile's shared memory and its loop over the depth.
template <typename T, typename S, bool kRowsAlong, bool kColumnsAlong>
struct TileProduct : Product<T, S, kRowsAlong, kColumnsAlong> {
  using Element = T;
  static constexpr int kStages = 3, kThreads = S::kThreads;
  static constexpr int kRows = S::kRows, kColumns = S::kColumns, kDepth = S::kDepth;
  static constexpr int kRowsLines = kRowsAlong ? kRows : kDepth;
  static constexpr int kRowsLength = kRowsAlong ? kDepth : kRows;
  static constexpr int kColumnsLines = kColumnsAlong ? kColumns : kDepth;
  static constexpr int kColumnsLength = kColumnsAlong ? kDepth : kColumns;
  static constexpr int kRowsElements = kRowsLines * padded<T>(kRowsLength);
  static constexpr int kStageElements = kRowsElements + kColumnsLines * padded<T>(kColumnsLength);
  static constexpr int kResultElements = kRows * padded<T>(kColumns);
  // What run() and store() need, one after the other.
  static constexpr int kElements =
      kStages * kStageElements > kResultElements ? kStages * kStageElements : kResultElements;

  PK_DEVICE static void load(
      T* stage, const Lines<T>& rows, int64_t row0, const Lines<T>& columns, int64_t column0,
      int64_t depth) {
    load_lines<kRowsLines, kRowsLength, kThreads>(
        stage, rows, kRowsAlong ? row0 : depth, kRowsAlong ? depth : row0);
    load_lines<kColumnsLines, kColumnsLength, kThreads>(
        stage + kRowsElements, columns, kColumnsAlong ? column0 : depth,
        kColumnsAlong ? depth : column0);
  }

  // Add rows [row0, + kRows) times columns [column0, + kColumns) over the depth [begin, end) to
  // the accumulators. arrived(rows tile, columns tile, depth) runs before each block of the depth
  // is multiplied, and may change the tile if it ends with a barrier. Shared memory is free
  // afterwards.
  template <typename Arrived>
  PK_DEVICE void run(
      T* shared, const Lines<T>& rows, int64_t row0, const Lines<T>& columns, int64_t column0,
      int64_t begin, int64_t end, Arrived arrived) {
    const int steps = static_cast<int>((end - begin + kDepth - 1) / kDepth);
    PK_UNROLL for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < steps)
        load(shared + stage * kStageElements, rows, row0, columns, column0, begin + stage * kDepth);
      device::cp_async_commit();
    }
    PK_NO_UNROLL for (int step = 0; step < steps; ++step) {
      device::cp_async_wait<kStages - 2>();
      // This step's tiles are there for all, and the last step's are no longer read.
      device::sync_threads();
      const int next = step + kStages - 1;
      if (next < steps)
        load(
            shared + next % kStages * kStageElements, rows, row0, columns, column0,
            begin + static_cast<int64_t>(next) * kDepth);
      device::cp_async_commit();
      T* tile = shared + step % kStages * kStageElements;
      arrived(tile, tile + kRowsElements, begin + static_cast<int64_t>(step) * kDepth);
      this->multiply(tile, tile + kRowsElements);
    }
    device::sync_threads();
  }

  // Store value(column, sum) as rows [row0, ...) and columns [column0, ...) of out, [rows, columns]
  // and contiguous, by way of shared memory so that neighbours are written together.
  template <typename Value>
  PK_DEVICE void store(
      T* shared, T* out, int64_t rows, int64_t columns, int64_t row0, int64_t column0,
      Value value) {
    this->visit([&](int row, int column, float& sum) {
      shared[row * padded<T>(kColumns) + column] = from_float<T>(value(column0 + column, sum));
    });
    write(shared, out, rows, columns, row0, column0);
  }

  // Write a tile that the block has put into shared memory, in padded lines, as such rows and columns
  // of out; where `order` is not null, row i is row order[i] of out.
  PK_DEVICE static void write(
      const T* shared, T* out, int64_t rows, int64_t columns, int64_t row0, int64_t column0,
      const int64_t* order = nullptr) {
    device::sync_threads();
    constexpr int kPack = kPackOf16<T>, kPerLine = kColumns / kPack;
    const bool aligned = is_aligned(out, 16) && columns % kPack == 0;
    PK_NO_UNROLL for (int i = device::thread_x(); i < kRows * kPerLine; i += kThreads) {
      const int64_t row = row0 + i / kPerLine, column = column0 + i % kPerLine * kPack;
      if (row >= rows || column >= columns) continue;
      const auto pack =
          load_pack<T, kPack>(shared + i / kPerLine * padded<T>(kColumns) + i % kPerLine * kPack);
      T* target = out + (order ? order[row] : row) * columns + column;
      if (aligned) {
        store_pack(target, pack);
      } else {
        PK_UNROLL for (int j = 0; j < kPack; ++j)
          if (column + j < columns) target[j] = pack[j];
      }
    }
    device::sync_threads();
  }
};

}  // namespace pk
