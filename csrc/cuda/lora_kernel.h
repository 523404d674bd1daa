// The one kernel of LoRA's products, as template: each type is compiled in a file of its own.
//
//     y = x w^T + bias + keep * (s b^T)      with  s = factor * (keep * x) a^T,  rounded to T
//
// Ticket order. Blocks take work items from an atomic counter. The first items *produce* a tile of
// s, store it and release the flag of its row block; the others are tiles of y, which run the
// whole depth of x w^T, then acquire their row block's flag and go on with s and b as further
// depth of the same accumulators. A producer never waits and all of them are handed out before the
// first tile, so progress needs no particular number of resident blocks. The last block to leave
// sets the counters back to zero. Where dropout acts on s b^T, that comes first, is masked in the
// accumulators, and x w^T is added to it.
//
// Read: x and w once per tile (L2), a once per row block, s and b once per tile. Written: y and s.
#pragma once

#include "lora.h"
#include "tile_product.h"

namespace pk {

constexpr int kGroupRows = 8;  // row blocks whose tiles follow each other, for the L2 cache

template <typename T>
struct LoRACall {
  Lines<T> x, w, a, s_lines, b;
  int64_t tokens, depth, columns, rank;
  const T* bias;
  const float* scale_at;
  float scale, inverse_keep;
  Dropout dropout;
  bool drops_output;
  T *y, *s;
  int* counters;  // [ticket, blocks done, one flag per row block]
};

template <typename Tile, typename T>
PK_DEVICE void produce(const LoRACall<T>& call, T* shared, int64_t row0, int64_t column0) {
  Tile tile;
  tile.clear();
  const bool drops = call.dropout.seed && !call.drops_output;
  tile.run(
      shared, call.x, row0, call.a, column0, 0, call.depth, [&](T* rows, T*, int64_t depth) {
        if (!drops) return;
        drop_in_lines<Tile::kRowsLines, Tile::kRowsLength, Tile::kThreads>(
            rows, call.x, row0, depth, call.depth, call.dropout);
        device::sync_threads();
      });
  const float factor = (call.scale_at ? *call.scale_at : call.scale) * call.inverse_keep;
  tile.store(
      shared, call.s, call.tokens, call.rank, row0, column0,
      [factor](int64_t, float sum) { return sum * factor; });
}

template <typename Tile, typename T>
PK_DEVICE void consume(
    const LoRACall<T>& call, T* shared, int64_t row0, int64_t column0, const int* flag,
    int producers) {
  Tile tile;
  tile.clear();
  const bool masked = call.dropout.seed && call.drops_output;
  PK_NO_UNROLL for (int turn = 0; turn < 2; ++turn) {
    const bool low_rank = (turn == 0) == masked;
    if (low_rank) {
      if (device::thread_x() == 0)
        while (device::load_acquire(flag) < producers) device::spin();
      device::sync_threads();
    }
    tile.run(
        shared, low_rank ? call.s_lines : call.x, row0, low_rank ? call.b : call.w, column0, 0,
        low_rank ? call.rank : call.depth, [](T*, T*, int64_t) {});
    if (low_rank && masked) tile.drop(row0, column0, call.columns, call.dropout);
  }
  const T* bias = call.bias;
  const int64_t columns = call.columns;
  tile.store(
      shared, call.y, call.tokens, columns, row0, column0, [bias, columns](int64_t n, float sum) {
        return bias && n < columns ? sum + to_float(bias[n]) : sum;
      });
}

template <typename Tile, typename T>
PK_KERNEL PK_LAUNCH_BOUNDS(Tile::kThreads, 1) void lora_kernel(LoRACall<T> call) {
  char* cursor = device::shared_memory();
  int* slot = device::carve<int>(cursor, 4);
  T* shared = device::carve<T>(cursor, Tile::kElements);
  const int blocks_m = static_cast<int>((call.tokens + Tile::kRows - 1) / Tile::kRows);
  const int blocks_n =
      call.y ? static_cast<int>((call.columns + Tile::kColumns - 1) / Tile::kColumns) : 0;
  const int blocks_r = static_cast<int>((call.rank + Tile::kColumns - 1) / Tile::kColumns);
  const int producers = blocks_m * blocks_r, total = producers + blocks_m * blocks_n;
  int* flags = call.counters + 2;
  for (;;) {
    if (device::thread_x() == 0) *slot = device::atomic_add(call.counters, 1);
    device::sync_threads();
    const int ticket = *slot;
    // Read by all before the next one is written.
    device::sync_threads();
    if (ticket >= total) break;
    if (ticket < producers) {
      const int m = ticket / blocks_r, r = ticket % blocks_r;
      produce<Tile>(
          call, shared, static_cast<int64_t>(m) * Tile::kRows,
          static_cast<int64_t>(r) * Tile::kColumns);
      // store() ends with a barrier: every thread's part of s is written.
      if (device::thread_x() == 0) device::add_release(flags + m, 1);
    } else {
      const int tile = ticket - producers, width = kGroupRows * blocks_n;
      const int first = tile / width * kGroupRows;
      const int size = blocks_m - first < kGroupRows ? blocks_m - first : kGroupRows;
      const int m = first + tile % width % size, n = tile % width / size;
      consume<Tile>(
          call, shared, static_cast<int64_t>(m) * Tile::kRows,
          static_cast<int64_t>(n) * Tile::kColumns, flags + m, blocks_r);
    }
  }
  if (device::thread_x() == 0)
    *slot = device::add_acquire_release(call.counters + 1, 1) == device::grid_x() - 1;
  device::sync_threads();
  if (!*slot) return;
  for (int i = device::thread_x(); i < blocks_m + 2; i += Tile::kThreads) call.counters[i] = 0;
}

template <typename Tile>
int launch_lora(const LoRAProduct& call, device::Stream stream) {
  using T = typename Tile::Element;
  const auto lines = [&](const Strided& matrix, int64_t rows, int64_t columns) {
    return call.along ? lines_of<T>(matrix.data, matrix.stride, rows, columns)
                      : lines_of<T>(matrix.data, matrix.stride, columns, rows);
  };
  const LoRACall<T> arguments{
      lines_of<T>(call.x.data, call.x.stride, call.tokens, call.depth),
      lines(call.w, call.columns, call.depth),
      lines(call.a, call.rank, call.depth),
      lines_of<T>(call.s, call.rank, call.tokens, call.rank),
      lines(call.b, call.columns, call.rank),
      call.tokens,
      call.depth,
      call.columns,
      call.rank,
      static_cast<const T*>(call.bias),
      call.scale_at,
      call.scale,
      call.inverse_keep,
      call.dropout,
      call.drops_output,
      static_cast<T*>(call.y),
      static_cast<T*>(call.s),
      call.counters,
  };
  const auto blocks = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  const int64_t items =
      blocks(call.tokens, Tile::kRows) * (blocks(call.rank, Tile::kColumns) +
                                          (call.y ? blocks(call.columns, Tile::kColumns) : 0));
  const int64_t most = 2 * call.multiprocessors;
  const int shared_bytes =
      device::carved_bytes(4 * sizeof(int)) + device::carved_bytes(Tile::kElements * sizeof(T));
  return device::launch(
      "lora_kernel", lora_kernel<Tile, T>, {items < most ? items : most}, Tile::kThreads,
      shared_bytes, stream, arguments);
}

// Tiles of 128 x 128 where they fill the GPU, else of 64 x 64 and deeper, with more bytes on the
// way.
template <typename T>
int launch_lora_16_bit(const LoRAProduct& call, device::Stream stream) {
  using Large = Shape<128, 128, 32, 2, 4>;
  using Small = Shape<64, 64, 64, 2, 2>;
  const int64_t tiles = (call.tokens + 127) / 128 * ((call.columns + 127) / 128);
  if (call.y && tiles >= call.multiprocessors)
    return call.along ? launch_lora<TileProduct<T, Large, true, true>>(call, stream)
                      : launch_lora<TileProduct<T, Large, true, false>>(call, stream);
  return call.along ? launch_lora<TileProduct<T, Small, true, true>>(call, stream)
                    : launch_lora<TileProduct<T, Small, true, false>>(call, stream);
}

int lora_product_half(const LoRAProduct& call, device::Stream stream);
int lora_product_bfloat16(const LoRAProduct& call, device::Stream stream);

}  // namespace pk
