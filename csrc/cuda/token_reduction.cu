// Grid (tiles of C0, then of C1; rank blocks; splits of the tokens, or groups of rows).
//
// A block sums one tile of columns over one part of the tokens in float; the last part of a tile to
// arrive adds the parts in index order, scales, and rounds once. Each activation is read once per
// rank block and nothing of its size is written; there is no floating-point atomic.
#include "token_reduction.h"

#include "tile_product.h"

namespace pk {
namespace {

template <typename T>
struct Side {
  Lines<T> v, low;
  Output out, sums;
  float *out_parts, *sums_parts;
};

template <typename T>
struct ReductionCall {
  Side<T> first, second;
  int64_t tokens, rank;
  int tiles0, tiles1;
  Dropout dropout;
  int dropped;
  ReductionScaling scaling;
  int splits;
  int* counters;
  const int64_t* offsets;
};

// Whether this block is the last of `expected` to come here; what the others wrote before they came
// is visible to it. Sets the counter back.
PK_DEVICE bool last_to_arrive(int* counter, int expected, int* slot) {
  device::sync_threads();
  if (device::thread_x() == 0) {
    const bool last = device::add_acquire_release(counter, 1) == expected - 1;
    if (last) *counter = 0;
    *slot = last;
  }
  device::sync_threads();
  return *slot;
}

// The scale's gradient from the shares of all tiles, in a fixed order.
template <int kThreads>
PK_DEVICE void sum_scale_gradient(
    const ReductionScaling& scaling, int64_t columns, int rank_blocks, float* shared) {
  float total = 0.0f;
  for (int64_t c = device::thread_x(); c < columns; c += kThreads) {
    if (scaling.per_column) total = 0.0f;
    for (int block = 0; block < rank_blocks; ++block) total += scaling.parts[block * columns + c];
    if (scaling.per_column) scaling.gradient[c] = total;
  }
  if (scaling.per_column) return;
  shared[device::thread_x()] = total;
  device::sync_threads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (device::thread_x() < width)
      shared[device::thread_x()] += shared[device::thread_x() + width];
    device::sync_threads();
  }
  if (device::thread_x() == 0) *scaling.gradient = shared[0];
}

template <typename Tile, typename T>
PK_KERNEL PK_LAUNCH_BOUNDS(Tile::kThreads, 1) void token_reduction_kernel(ReductionCall<T> call) {
  constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  static_assert(Tile::kThreads >= kRows + kColumns);
  char* cursor = device::shared_memory();
  int* slot = device::carve<int>(cursor, 4);
  T* shared = device::carve<T>(cursor, Tile::kElements);
  float* products =
      device::carve<float>(cursor, call.scaling.gradient ? kRows * (kColumns + 1) : 0);

  const bool second = device::block_x() >= call.tiles0;
  const Side<T>& side = second ? call.second : call.first;
  const ReductionScaling& scaling = call.scaling;
  const int tile_c = device::block_x() - (second ? call.tiles0 : 0), block_r = device::block_y();
  const int64_t c0 = static_cast<int64_t>(tile_c) * kRows;
  const int64_t r0 = static_cast<int64_t>(block_r) * kColumns;
  const int64_t columns = side.v.length, rank = call.rank, part = device::block_z();
  const bool wants_sums = side.sums.data && (second ? block_r == 0 : tile_c == 0);
  if (!side.out.data && !wants_sums) return;

  int64_t begin, end, group = 0;
  if (call.offsets) {
    begin = call.offsets[part], end = call.offsets[part + 1], group = part;
  } else {
    const int64_t blocks = (call.tokens + Tile::kDepth - 1) / Tile::kDepth;
    const int64_t tokens = (blocks + call.splits - 1) / call.splits * Tile::kDepth;
    begin = part * tokens < call.tokens ? part * tokens : call.tokens;
    end = begin + tokens < call.tokens ? begin + tokens : call.tokens;
  }
  Lines<T> v = side.v, low = side.low;
  v.lines = low.lines = end;
  const bool drops = call.dropout.seed && call.dropped == (second ? 1 : 0);
  // The sums: thread c has column c of v, thread kRows + r column r of low.
  const int place = device::thread_x() - (second ? 0 : kRows);
  const bool sums = wants_sums && place >= 0 && place < (second ? kRows : kColumns);
  float sum = 0.0f;

  Tile tile;
  tile.clear();
  tile.run(shared, v, c0, low, r0, begin, end, [&](T* v_tile, T* low_tile, int64_t m) {
    if (drops) {
      drop_in_lines<Tile::kRowsLines, Tile::kRowsLength, Tile::kThreads>(
          v_tile, v, m, c0, columns, call.dropout);
      device::sync_threads();
    }
    if (!sums) return;
    const T* column = (second ? v_tile : low_tile) + place;
    constexpr int kStep = padded<T>(kRows);
    static_assert(kRows == kColumns);
    // In four interleaved sums: a chain of all tokens would round too often.
    float four[4] = {};
    PK_UNROLL for (int i = 0; i < Tile::kDepth; ++i) four[i % 4] += to_float(column[i * kStep]);
    sum += (four[0] + four[1]) + (four[2] + four[3]);
  });

  const int64_t sums_at = (second ? c0 : r0) + place, sums_size = second ? columns : rank;
  const bool stores_sums = sums && sums_at < sums_size;
  if (call.splits > 1) {
    float* out_part = side.out_parts + part * columns * rank;
    if (side.out.data)
      tile.visit([&](int c, int r, float& value) {
        if (c0 + c < columns && r0 + r < rank) out_part[(c0 + c) * rank + r0 + r] = value;
      });
    if (stores_sums) side.sums_parts[part * sums_size + sums_at] = sum;
    const int tile_index = device::block_x() * device::grid_y() + block_r;
    if (!last_to_arrive(call.counters + tile_index, call.splits, slot)) return;
    tile.clear();
    sum = 0.0f;
    for (int i = 0; i < call.splits; ++i) {
      const float* each = side.out_parts + i * columns * rank;
      if (side.out.data)
        tile.visit([&](int c, int r, float& value) {
          if (c0 + c < columns && r0 + r < rank) value += each[(c0 + c) * rank + r0 + r];
        });
      if (stores_sums) sum += side.sums_parts[i * sums_size + sums_at];
    }
  }

  const bool scaled = second && scaling.active;
  if (scaled && scaling.gradient) {
    const T* weight = static_cast<const T*>(scaling.weight);
    tile.visit([&](int c, int r, float& value) {
      const bool inside = c0 + c < columns && r0 + r < rank;
      products[c * (kColumns + 1) + r] =
          inside ? value * to_float(weight[(c0 + c) * rank + r0 + r]) : 0.0f;
    });
    device::sync_threads();
    const int c = device::thread_x();
    if (c < kRows && c0 + c < columns) {
      float four[4] = {};
      PK_UNROLL for (int r = 0; r < kColumns; ++r)
        four[r % 4] += products[c * (kColumns + 1) + r];
      float share = (four[0] + four[1]) + (four[2] + four[3]);
      if (scaling.bias && stores_sums)
        share += to_float(static_cast<const T*>(scaling.bias)[c0 + c]) * sum;
      scaling.parts[block_r * columns + c0 + c] = share * scaling.inverse_keep;
    }
  }
  const auto factor = [&](int64_t column) {
    if (!scaled) return 1.0f;
    const float* at = scaling.scale_at;
    return (at ? at[scaling.per_column ? column : 0] : scaling.scale) * scaling.inverse_keep;
  };
  if (side.out.data) {
    const Output& out = side.out;
    const int64_t base = group * columns * rank;
    tile.visit([&](int c, int r, float& value) {
      if (c0 + c < columns && r0 + r < rank)
        store_as(
            out.data, out.type, base + (c0 + c) * out.stride_c + (r0 + r) * out.stride_r,
            scaled ? value * factor(c0 + c) : value);
    });
  }
  if (stores_sums)
    store_as(
        side.sums.data, side.sums.type, group * sums_size + sums_at,
        scaled ? sum * factor(sums_at) : sum);
  if (scaled && scaling.gradient) {
    const int tiles = call.tiles1 * device::grid_y();
    int* counter = call.counters + (call.tiles0 + call.tiles1) * device::grid_y();
    if (last_to_arrive(counter, tiles, slot))
      sum_scale_gradient<Tile::kThreads>(scaling, columns, device::grid_y(), products);
  }
}

template <typename T, typename S>
int launch_reduction(const TokenReduction& call, device::Stream stream) {
  using Tile = TileProduct<T, S, false, false>;
  const auto blocks = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  float* parts = call.parts;
  const auto take = [&parts](int64_t size) {
    float* taken = parts;
    parts += size;
    return taken;
  };
  const auto side_of = [&](const ReductionSide& side, int64_t sums) {
    return Side<T>{
        lines_of<T>(side.v, side.v_stride, call.tokens, side.columns, call.order),
        lines_of<T>(side.low, call.rank, call.tokens, call.rank, call.order),
        side.out,
        side.sums,
        call.splits > 1 ? take(call.splits * side.columns * call.rank) : nullptr,
        call.splits > 1 ? take(call.splits * sums) : nullptr,
    };
  };
  const Side<T> first = side_of(call.first, call.rank);
  const Side<T> second = side_of(call.second, call.second.columns);
  // The sums of the low side need one tile of columns.
  const int64_t tiles0 =
      first.out.data ? blocks(call.first.columns, Tile::kRows) : first.sums.data != nullptr;
  const int64_t tiles1 =
      second.out.data || second.sums.data ? blocks(call.second.columns, Tile::kRows) : 0;
  // Where no product is wanted the rank blocks beyond the first have nothing to do.
  const bool blocked = first.out.data || second.out.data || first.sums.data;
  const int64_t rank_blocks = blocked ? blocks(call.rank, Tile::kColumns) : 1;
  if (tiles0 + tiles1 == 0) return 0;
  const ReductionCall<T> arguments{
      first,
      second,
      call.tokens,
      call.rank,
      static_cast<int>(tiles0),
      static_cast<int>(tiles1),
      call.dropout,
      static_cast<int>(call.dropped),
      call.scaling,
      static_cast<int>(call.order ? 1 : call.splits),
      call.counters,
      call.order ? call.offsets : nullptr,
  };
  const int products = call.scaling.gradient ? Tile::kRows * (Tile::kColumns + 1) : 0;
  const int shared_bytes = device::carved_bytes(4 * sizeof(int)) +
                           device::carved_bytes(Tile::kElements * sizeof(T)) +
                           device::carved_bytes(products * sizeof(float));
  return device::launch(
      "token_reduction_kernel", token_reduction_kernel<Tile, T>,
      {tiles0 + tiles1, rank_blocks, call.order ? call.groups : call.splits}, Tile::kThreads,
      shared_bytes, stream, arguments);
}

}  // namespace

int token_reduction(const TokenReduction& call, device::Stream stream) {
  switch (call.type) {
    case Type::kFloat16: return launch_reduction<Half, Shape<64, 64, 32, 2, 2>>(call, stream);
    case Type::kBFloat16: return launch_reduction<BFloat16, Shape<64, 64, 32, 2, 2>>(call, stream);
    default: return launch_reduction<float, Shape<64, 64, 16, 2, 2>>(call, stream);
  }
}

}  // namespace pk
