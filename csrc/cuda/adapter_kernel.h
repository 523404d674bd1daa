// The one kernel of the bottleneck adapter, as template: each type is compiled in a file of its own.
// adapter.h has the equations.
//
// Grid (row blocks). A block holds kRows rows. For each 64 columns of the bottleneck it runs all of D to
// *contract* its rows, and makes what the activation says of the float sums, rounded to T; then it
// *expands* that again to D, 64 features after the other: low is the block's own, written just before.
//
// Read: v once for each 64 columns of the bottleneck, `added` once (L2 where it is v), the weights once
// per row block (L2). Written: out and [tokens, bottleneck] twice. The mask is drawn again from its seed.
#pragma once

#include "adapter.h"
#include "tile_product.h"

namespace pk {

template <typename T>
struct AdapterCall {
  Lines<T> v, inner, low_lines, outer, added;
  int64_t tokens, features, bottleneck;
  const T *inner_bias, *outer_bias;
  const float* scale_at;
  bool per_channel;
  float scale, inverse_keep;
  Activation activation;
  Dropout dropout;
  T *pre, *low, *hidden, *out;
  RowGroups groups;
};

// Rows [first, end) of the order, and their adapter; -1: they have none.
struct BlockRows {
  int64_t adapter, first, end;
};

PK_DEVICE BlockRows rows_of_block(const RowGroups& groups, int64_t tokens, int rows) {
  const int64_t tile = device::block_x();
  if (!groups.order) return {0, tile * rows, tokens};
  // The last group that starts at this tile or before it: those that start with it are empty.
  int64_t group = 0, beyond = groups.count;
  while (beyond - group > 1) {
    const int64_t middle = (group + beyond) / 2;
    if (groups.tiles[middle] <= tile)
      group = middle;
    else
      beyond = middle;
  }
  const int64_t first = groups.offsets[group] + (tile - groups.tiles[group]) * rows;
  return {group - 1, first, groups.offsets[group + 1]};
}

template <typename T>
PK_DEVICE Lines<T> up_to(Lines<T> rows, int64_t end) {
  rows.lines = end;
  return rows;
}

// A weight of one adapter of several, each of `size` elements.
template <typename T>
PK_DEVICE Lines<T> of_adapter(Lines<T> weight, int64_t adapter, int64_t size) {
  weight.data += adapter * size;
  weight.aligned = weight.aligned && is_aligned(weight.data, 16);
  return weight;
}

// Multiply the elements [begin, begin + kLength) of lines in shared memory by those of `factors`.
template <int kLines, int kLength, int kThreads, typename T>
PK_DEVICE void scale_in_lines(T* shared, int64_t begin, int64_t columns, const float* factors) {
  PK_NO_UNROLL for (int i = device::thread_x(); i < kLines * kLength; i += kThreads) {
    const int64_t column = begin + i % kLength;
    T& value = shared[i / kLength * padded<T>(kLength) + i % kLength];
    if (column < columns) value = from_float<T>(to_float(value) * factors[column]);
  }
}

// Store what the block has of low, and of pre or hidden, in columns [r0, r0 + kColumns).
template <typename Tile, bool kBackward, typename T>
PK_DEVICE void contract(
    const AdapterCall<T>& call, const BlockRows& block, T* shared, int64_t r0) {
  constexpr int kWidth = Tile::kColumns + 8;
  static_assert(Tile::kRows * kWidth * sizeof(float) <= Tile::kElements * sizeof(T));
  const Lines<T> v = up_to(call.v, block.end);
  const int64_t features = call.features, rank = call.bottleneck;
  float* sums = reinterpret_cast<float*>(shared);
  if (!kBackward || call.low) {
    const bool drops = kBackward && call.dropout.seed, scales = kBackward && call.per_channel;
    Tile tile;
    tile.clear();
    tile.run(
        shared, v, block.first, of_adapter(call.inner, block.adapter, rank * features), r0, 0,
        features, [&](T* rows, T*, int64_t depth) {
          if (drops) {
            drop_in_lines<Tile::kRowsLines, Tile::kRowsLength, Tile::kThreads>(
                rows, v, block.first, depth, features, call.dropout);
            device::sync_threads();
          }
          if (scales) {
            scale_in_lines<Tile::kRowsLines, Tile::kRowsLength, Tile::kThreads>(
                rows, depth, features, call.scale_at);
            device::sync_threads();
          }
        });
    tile.visit([&](int row, int column, float& sum) { sums[row * kWidth + column] = sum; });
    device::sync_threads();
  }
  const T* bias = call.inner_bias ? call.inner_bias + block.adapter * rank : nullptr;
  const float* scale_at = call.per_channel ? nullptr : call.scale_at;
  const float scale = call.per_channel ? 1.0f : scale_at ? *scale_at : call.scale;
  // Not unrolled: the activation is chosen in it.
  PK_NO_UNROLL for (int i = device::thread_x(); i < Tile::kRows * Tile::kColumns;
                    i += Tile::kThreads) {
    const int row = i / Tile::kColumns, column = i % Tile::kColumns;
    if (block.first + row >= block.end || r0 + column >= rank) continue;
    const int64_t at = v.line(block.first + row) * rank + r0 + column;
    if constexpr (kBackward) {
      const float pre = to_float(call.pre[at]);
      if (call.hidden) call.hidden[at] = from_float<T>(activate(call.activation, pre));
      if (call.low) {
        const float sum = sums[row * kWidth + column] * (scale * call.inverse_keep);
        call.low[at] = from_float<T>(derivative(call.activation, pre) * sum);
      }
    } else {
      const float sum = sums[row * kWidth + column];
      const T pre = from_float<T>(bias ? sum + to_float(bias[r0 + column]) : sum);
      call.pre[at] = pre;
      call.low[at] = from_float<T>(activate(call.activation, to_float(pre)));
    }
  }
  // What is in shared memory is read, and what the block wrote of low is there for all of it.
  device::sync_threads();
}

// Store out of the block's rows in columns [c0, c0 + kColumns), from `rank` columns of low.
template <typename Tile, bool kBackward, typename T>
PK_DEVICE void expand(
    const AdapterCall<T>& call, const BlockRows& block, T* shared, T* result, int64_t c0,
    int64_t rank) {
  constexpr int kStep = padded<T>(Tile::kColumns);
  const int64_t features = call.features;
  // What is added arrives while the product is made.
  const bool adds = call.added.data;
  if (adds)
    load_lines<Tile::kRows, Tile::kColumns, Tile::kThreads>(
        result, up_to(call.added, block.end), block.first, c0);
  device::cp_async_commit();
  Tile tile;
  tile.clear();
  const int64_t adapter = block.adapter < 0 ? 0 : block.adapter;
  tile.run(
      shared, up_to(call.low_lines, block.end), block.first,
      of_adapter(call.outer, adapter, call.bottleneck * features), c0, 0, rank,
      [](T*, T*, int64_t) {});
  // A product of no depth has waited for nothing.
  device::cp_async_wait<0>();
  device::sync_threads();
  if constexpr (!kBackward) {
    if (call.outer_bias && rank) {
      const T* bias = call.outer_bias + adapter * features;
      tile.visit([&](int, int column, float& sum) {
        if (c0 + column < features) sum += to_float(bias[c0 + column]);
      });
    }
    if (call.dropout.seed)
      tile.drop(block.first, c0, features, call.dropout, [&](int64_t row) {
        return row < block.end ? call.v.line(row) : 0;
      });
  }
  const auto factor = [&](int64_t column) {
    if (kBackward) return 1.0f;
    if (!call.per_channel) return (call.scale_at ? *call.scale_at : call.scale) * call.inverse_keep;
    return column < features ? call.scale_at[column] * call.inverse_keep : 0.0f;
  };
  tile.visit([&](int row, int column, float& sum) {
    T& place = result[row * kStep + column];
    const float value = sum * factor(c0 + column);
    place = from_float<T>(adds ? value + to_float(place) : value);
  });
  Tile::write(result, call.out, block.end, features, block.first, c0, call.groups.order);
}

template <typename Tile, bool kBackward, typename T>
PK_KERNEL PK_LAUNCH_BOUNDS(Tile::kThreads, 1) void adapter_kernel(AdapterCall<T> call) {
  char* cursor = device::shared_memory();
  T* shared = device::carve<T>(cursor, Tile::kElements);
  T* result = device::carve<T>(cursor, Tile::kResultElements);
  const BlockRows block = rows_of_block(call.groups, call.tokens, Tile::kRows);
  if (block.first >= block.end) return;
  const int64_t rank = block.adapter < 0 ? 0 : call.bottleneck;
  PK_NO_UNROLL for (int64_t r0 = 0; r0 < rank; r0 += Tile::kColumns)
    contract<Tile, kBackward>(call, block, shared, r0);
  if (!call.out) return;
  PK_NO_UNROLL for (int64_t c0 = 0; c0 < call.features; c0 += Tile::kColumns)
    expand<Tile, kBackward>(call, block, shared, result, c0, rank);
}

// Forward multiplies by weights whose unit stride is along the depth, backward across it.
template <typename T, typename S, bool kBackward>
int launch_adapter(const AdapterPass& call, device::Stream stream) {
  using Tile = TileProduct<T, S, true, !kBackward>;
  const int64_t tokens = call.tokens, features = call.features, rank = call.bottleneck;
  const RowGroups& groups = call.groups;
  const auto inner = kBackward ? lines_of<T>(call.inner, rank, features, rank)
                               : lines_of<T>(call.inner, features, rank, features);
  const auto outer = kBackward ? lines_of<T>(call.outer, features, rank, features)
                               : lines_of<T>(call.outer, rank, features, rank);
  const AdapterCall<T> arguments{
      lines_of<T>(call.v, call.v_stride, tokens, features, groups.order),
      inner,
      lines_of<T>(call.low, rank, tokens, rank, groups.order),
      outer,
      lines_of<T>(call.added, call.added_stride, tokens, features, groups.order),
      tokens,
      features,
      rank,
      static_cast<const T*>(call.inner_bias),
      static_cast<const T*>(call.outer_bias),
      call.scale_at,
      call.per_channel,
      call.scale,
      call.inverse_keep,
      call.activation,
      call.dropout,
      static_cast<T*>(call.pre),
      static_cast<T*>(call.low),
      static_cast<T*>(call.hidden),
      static_cast<T*>(call.out),
      groups,
  };
  // Each group may leave one tile unfilled.
  const int64_t blocks =
      (tokens + Tile::kRows - 1) / Tile::kRows + (groups.order ? groups.count : 0);
  const int shared_bytes = device::carved_bytes(Tile::kElements * sizeof(T)) +
                           device::carved_bytes(Tile::kResultElements * sizeof(T));
  return device::launch(
      "adapter_kernel", adapter_kernel<Tile, kBackward, T>, {blocks}, Tile::kThreads, shared_bytes,
      stream, arguments);
}

// Small tiles where large ones would leave multiprocessors without work.
template <typename T, typename Small, typename Large>
int launch_adapter_of(const AdapterPass& call, device::Stream stream) {
  static_assert(Small::kRows == 16 && Large::kRows == 64);
  if (call.tile_rows == Large::kRows)
    return call.backward ? launch_adapter<T, Large, true>(call, stream)
                         : launch_adapter<T, Large, false>(call, stream);
  return call.backward ? launch_adapter<T, Small, true>(call, stream)
                       : launch_adapter<T, Small, false>(call, stream);
}

template <typename T>
int launch_adapter_16_bit(const AdapterPass& call, device::Stream stream) {
  return launch_adapter_of<T, Shape<16, 64, 64, 1, 4>, Shape<64, 64, 32, 2, 2>>(call, stream);
}

int adapter_pass_half(const AdapterPass& call, device::Stream stream);
int adapter_pass_bfloat16(const AdapterPass& call, device::Stream stream);

}  // namespace pk
