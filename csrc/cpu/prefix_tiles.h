// What a thread of either direction holds: a packed segment of keys, a block of rows, their scores.
#pragma once

#include "prefix_blocks.h"

namespace pk {

inline Buffer<float> words(int64_t count) { return uninitialized<float>(count); }

template <typename K>
struct Tiles {
  using T = typename K::Element;

  Tiles(const PrefixCall& given, const Ranges& seen)
      : call(given),
        ranges(seen),
        blocks(given),
        sizes(sizes_of<K>(given)),
        panel_columns(round_up(sizes.padded_head, kPanel)),
        staged(words(sizes.keys * sizes.words)),
        keys(words(sizes.keys * sizes.words)),
        queries(words(sizes.rows * sizes.words)),
        scores(words(sizes.rows * kDepth)),
        plain(words(K::kPair == 1 ? 0 : sizes.rows * kDepth / 2)),
        keep(uninitialized<uint32_t>(given.dropout.active ? sizes.rows * kDepth : 0)),
        key_keep(uninitialized<uint32_t>(sizes.keys)),
        begin(sizes.rows),
        end(sizes.rows) {}

  int64_t first_head() const { return kv_head * blocks.group; }
  int64_t block_count() const { return blocks.count(last - first); }
  int64_t place_of(int64_t head, int64_t query) const {
    return (sample * call.heads + head) * call.queries + query;
  }

  // visit(row of the item, head, query) for every row of the item.
  template <typename Visit>
  void for_each_row(const Visit& visit) const {
    for (int64_t index = 0; index < block_count(); ++index) {
      const RowBlock block = blocks.at(index, first, last);
      for (int64_t row = 0; row < block.rows(); ++row)
        visit(
            index * sizes.rows + row, first_head() + block.head + row / block.queries,
            block.query + row % block.queries);
    }
  }

  // Rows of keys or values that the key mask hides are staged as zeros: what lies there is not read.
  void stage(const Heads& from, const Segment& segment) {
    K::stage(
        row_at<T>(from, sample, kv_head, segment.first), from.row, segment.count, call.head_size,
        segment.padded(), sizes.words, masked ? key_keep.get() : nullptr, staged.get());
  }

  void pack_keys(const Segment& segment) {
    masked = !segment.prefix && call.key_mask;
    if (masked) fill_key_keep(call, segment, sample, key_keep.get());
    stage(segment.prefix ? call.prefix_key : call.key, segment);
    transpose_to_panels(staged.get(), segment.padded(), sizes.words, keys.get());
  }

  void stage_rows(const Heads& from, const RowBlock& block, float* to) const {
    stage_block<K>(from, block, sample, first_head(), call.head_size, sizes, to);
  }

  // visit(block, its index, first key, width) for every tile of the segment that is not hidden.
  // open(block, index) comes before the tiles of a block, whose queries are staged.
  template <typename Open, typename Visit>
  void for_each_tile(const Segment& segment, const Open& open, const Visit& visit) {
    for (int64_t index = 0; index < block_count(); ++index) {
      const RowBlock block = blocks.at(index, first, last);
      const Visible visible = visible_in(segment, ranges, block);
      if (visible.begin >= visible.end) continue;
      stage_rows(call.query, block, queries.get());
      fill_row_ranges(call, segment, ranges, block, sizes.rows, begin.data(), end.data());
      open(block, index);
      for (int64_t k = visible.begin; k < visible.end; k += kKeyBlock)
        visit(
            make_scores(
                segment, block, k, round_up(std::min(kKeyBlock, visible.end - k), kLanes)),
            index, k);
    }
  }

  // to[rows, kDepth] = rows times the panels of the keys from k on.
  void multiply_keys(
      const float* rows, int64_t count, const float* panels, int64_t k, int64_t width, float* to) {
    K::multiply({
        .a = rows, .a_row = sizes.words, .a_step = 1,
        .b = panels + k * sizes.words, .b_panel = sizes.words * kPanel,
        .c = to, .c_stride = kDepth,
        .rows = count, .columns = width, .depth = sizes.words, .fresh = true,
    });
  }

  // sums[rows, padded head] += factors[rows, width] times the packed rows of the keys from k on.
  void add_keys(
      const Narrowed& factors, const ScoreTile& tile, const Segment& segment, const float* panels,
      int64_t k, float* sums) {
    K::multiply({
        .a = factors.plain, .a_row = factors.plain_row, .a_step = 1,
        .b = panels + k / K::kPair * kPanel, .b_panel = segment.padded() / K::kPair * kPanel,
        .c = sums, .c_stride = sizes.padded_head,
        .rows = tile.rows, .columns = sizes.padded_head, .depth = tile.width / K::kPair,
        .fresh = false,
    });
  }

  const PrefixCall& call;
  const Ranges& ranges;
  const RowBlocks blocks;
  const Sizes sizes;
  const int64_t panel_columns;
  int64_t sample = 0, kv_head = 0, first = 0, last = 0;  // of the item: queries [first, last)
  bool masked = false;
  Buffer<float> staged, keys, queries, scores, plain;
  Buffer<uint32_t> keep, key_keep;
  std::vector<int64_t> begin, end;

 private:
  ScoreTile make_scores(const Segment& segment, const RowBlock& block, int64_t k, int64_t width) {
    const int64_t rows = round_up(block.rows(), kRowStep);
    multiply_keys(queries.get(), rows, keys.get(), k, width, scores.get());
    if (call.dropout.active)
      draw_block(call, segment, block, sample, kv_head, segment.first + k, keep.get());
    return {
        .scores = scores.get(), .rows = rows, .width = width, .first_key = segment.first + k,
        .begin = begin.data(), .end = end.data(),
        .key_keep = masked ? key_keep.get() + k : nullptr,
        .keep = call.dropout.active ? keep.get() : nullptr,
        .keep_scale = call.keep_scale, .scale = call.scale,
    };
  }
};

}  // namespace pk
