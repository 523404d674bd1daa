// How a call is cut: items for the threads, blocks of rows, segments and blocks of keys.
//
// Every cut follows from the shapes alone, so that no result depends on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "pack.h"
#include "prefix.h"
#include "prefix_rows.h"
#include "prefix_words.h"

namespace pk {

constexpr int64_t kRowBlock = 128;    // rows of a block, about
constexpr int64_t kQueryBlock = 64;   // queries of a block: more would compute more of what is hidden
constexpr int64_t kKeyBlock = kDepth;
constexpr int64_t kSegment = 512;     // keys packed together

// Sequence keys [begin[i], end[i]) are those that query i may see, key mask aside.
struct Ranges {
  std::vector<int64_t> begin, end;
};

Ranges ranges_of(const PrefixCall& call);

// Rows of one key head: all pairs of some of its query heads and some queries, queries innermost.
struct RowBlock {
  int64_t head, heads, query, queries;
  int64_t rows() const { return heads * queries; }
};

struct RowBlocks {
  int64_t group;           // query heads of a key head
  int64_t heads, queries;  // of a block

  explicit RowBlocks(const PrefixCall& call)
      : group(call.heads / call.kv_heads),
        heads(std::min(group, kRowBlock)),
        queries(std::clamp<int64_t>(kRowBlock / heads, 1, kQueryBlock)) {}

  int64_t stride() const { return round_up(heads * queries, kRowStep); }
  int64_t across() const { return (group + heads - 1) / heads; }
  int64_t count(int64_t query_count) const { return across() * ((query_count + queries - 1) / queries); }
  RowBlock at(int64_t index, int64_t first, int64_t last) const {
    const int64_t head = index % across() * heads, query = first + index / across() * queries;
    return {head, std::min(heads, group - head), query, std::min(queries, last - query)};
  }
};

// Keys [first, first + count) of the prefix or of the sequence.
struct Segment {
  bool prefix;
  int64_t first, count;
  int64_t padded() const { return round_up(count, kLanes); }
};

// What of the prefix, and of the sequence that queries [first, last) see, is packed together.
std::vector<Segment> prefix_segments(const PrefixCall& call);
std::vector<Segment> sequence_segments(
    const PrefixCall& call, const Ranges& ranges, int64_t first, int64_t last);

// Keys [begin, end) of the segment, from its first on, that some row of the block sees.
struct Visible {
  int64_t begin, end;
};

Visible visible_in(const Segment& segment, const Ranges& ranges, const RowBlock& block);

// begin and end [stride] of every row of the block; those that pad it see nothing.
void fill_row_ranges(
    const PrefixCall& call, const Segment& segment, const Ranges& ranges, const RowBlock& block,
    int64_t stride, int64_t* begin, int64_t* end);

// key_keep [padded]: all ones where the key mask of the sample keeps a key of the sequence.
void fill_key_keep(const PrefixCall& call, const Segment& segment, int64_t sample, uint32_t* key_keep);

// Draw keep[stride, kDepth] for the keys from `first_key` of the segment's range on.
void draw_block(
    const PrefixCall& call, const Segment& segment, const RowBlock& block, int64_t sample,
    int64_t kv_head, int64_t first_key, uint32_t* keep);

// What a thread needs for blocks of rows and of keys, in words.
struct Sizes {
  int64_t padded_head;  // head size rounded up to kLanes
  int64_t words;        // of a staged row
  int64_t rows;         // of a block, padded
  int64_t keys;         // of a segment, padded to whole panels
};

template <typename K>
Sizes sizes_of(const PrefixCall& call) {
  const int64_t padded = round_up(call.head_size, kLanes);
  const int64_t keys = std::min(kSegment, std::max(call.prefix, round_up(call.keys, kPanel)));
  return {padded, padded / K::kPair, RowBlocks(call).stride(), round_up(std::max<int64_t>(keys, 1), kPanel)};
}

template <typename T>
const T* row_at(const Heads& heads, int64_t sample, int64_t head, int64_t row) {
  return static_cast<const T*>(heads.data) + sample * heads.batch + head * heads.head + row * heads.row;
}

// Stage the rows of a block, head by head: [stride, words], zero beyond.
template <typename K>
void stage_block(
    const Heads& heads, const RowBlock& block, int64_t sample, int64_t first_head, int64_t head_size,
    const Sizes& sizes, float* to) {
  using T = typename K::Element;
  for (int64_t h = 0; h < block.heads; ++h) {
    const bool last = h + 1 == block.heads;
    K::stage(
        row_at<T>(heads, sample, first_head + block.head + h, block.query), heads.row, block.queries,
        head_size, last ? sizes.rows - h * block.queries : block.queries, sizes.words, nullptr,
        to + h * block.queries * sizes.words);
  }
}

// Run items [0, count), each on whichever thread is free: make() gives a thread what it works with.
template <typename Make>
void for_each_item(int64_t count, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t item = next++;
    if (item >= count) return;
    auto work = make();
    for (; item < count; item = next++) work(item);
  });
}

}  // namespace pk
