// Forward: an item is one key head of one sample and a chunk of its queries. Segment by segment, keys
// and values are packed and every block of rows moves its running softmax on.
#include <cmath>
#include <limits>

#include "prefix_blocks.h"

namespace pk {
namespace {

constexpr int64_t kItems = 64;        // wanted, for threads to share
constexpr int64_t kFewestRows = 512;  // of an item: fewer would pack keys too often
constexpr int64_t kMostRows = 2048;   // whose sums stay in the second-level cache

int64_t queries_per_item(const PrefixCall& call, const RowBlocks& blocks) {
  const int64_t heads = std::max<int64_t>(1, call.batch * call.kv_heads);
  const int64_t rows = call.queries * blocks.group;
  const int64_t chunks = std::clamp((kItems + heads - 1) / heads, (rows + kMostRows - 1) / kMostRows,
                                    std::max<int64_t>(1, rows / kFewestRows));
  return round_up((call.queries + chunks - 1) / chunks, blocks.queries);
}

template <typename K>
class Forward {
 public:
  using T = typename K::Element;

  Forward(const PrefixCall& call, const Ranges& ranges, const RowBlocks& blocks, int64_t item_queries)
      : call_(call),
        ranges_(ranges),
        blocks_(blocks),
        sizes_(sizes_of<K>(call)),
        item_queries_(item_queries),
        staged_(uninitialized<float>(sizes_.keys * sizes_.words)),
        keys_(uninitialized<float>(sizes_.keys * sizes_.words)),
        values_(uninitialized<float>(sizes_.keys / K::kPair * round_up(sizes_.padded_head, kPanel))),
        queries_(uninitialized<float>(sizes_.rows * sizes_.words)),
        scores_(uninitialized<float>(sizes_.rows * kDepth)),
        plain_(uninitialized<float>(K::kPair == 1 ? 0 : sizes_.rows * kDepth / 2)),
        keep_(uninitialized<uint32_t>(call.dropout.active ? sizes_.rows * kDepth : 0)),
        key_keep_(uninitialized<uint32_t>(sizes_.keys)),
        begin_(sizes_.rows),
        end_(sizes_.rows) {
    const int64_t rows = blocks.count(std::min(item_queries, call.queries)) * sizes_.rows;
    acc_.resize(rows * sizes_.padded_head);
    peak_.resize(rows);
    total_.resize(rows);
    if (call.gate) gated_.resize(acc_.size());
  }

  void operator()(int64_t item) {
    const int64_t chunks = (call_.queries + item_queries_ - 1) / item_queries_;
    first_ = item % chunks * item_queries_;
    last_ = std::min(call_.queries, first_ + item_queries_);
    kv_head_ = item / chunks % call_.kv_heads;
    sample_ = item / chunks / call_.kv_heads;
    reset();
    for (const Segment& segment : prefix_segments(call_)) attend(segment);
    if (call_.gate) {
      finish(call_.prefix_lse, [&](int64_t row, int64_t head, int64_t, const float* line, float scale) {
        const float factor = std::tanh(call_.gate[head]) * scale;
        float* to = gated_.data() + row * sizes_.padded_head;
        for (int64_t c = 0; c < call_.head_size; ++c) to[c] = factor * line[c];
      });
      reset();
    }
    for (const Segment& segment : sequence_segments(call_, ranges_, first_, last_)) attend(segment);
    finish(call_.lse, [&](int64_t row, int64_t head, int64_t place, const float* line, float scale) {
      T* to = static_cast<T*>(call_.out) + place * call_.head_size;
      // A closed gate adds nothing, not even the sign of a zero.
      if (call_.gate && call_.gate[head] != 0.0f) {
        const float* more = gated_.data() + row * sizes_.padded_head;
        for (int64_t c = 0; c < call_.head_size; ++c) from_float(line[c] * scale + more[c], to + c);
      } else {
        for (int64_t c = 0; c < call_.head_size; ++c) from_float(line[c] * scale, to + c);
      }
    });
  }

 private:
  void reset() {
    std::fill(acc_.begin(), acc_.end(), 0.0f);
    std::fill(peak_.begin(), peak_.end(), -std::numeric_limits<float>::infinity());
    std::fill(total_.begin(), total_.end(), 0.0f);
  }

  void pack(const Segment& segment) {
    const Heads& key = segment.prefix ? call_.prefix_key : call_.key;
    const Heads& value = segment.prefix ? call_.prefix_value : call_.value;
    masked_ = !segment.prefix && call_.key_mask;
    if (masked_) fill_key_keep(call_, segment, sample_, key_keep_.get());
    const uint32_t* keep = masked_ ? key_keep_.get() : nullptr;
    const int64_t padded = segment.padded();
    K::stage(
        row_at<T>(key, sample_, kv_head_, segment.first), key.row, segment.count, call_.head_size,
        padded, sizes_.words, keep, staged_.get());
    transpose_to_panels(staged_.get(), padded, sizes_.words, keys_.get());
    K::stage(
        row_at<T>(value, sample_, kv_head_, segment.first), value.row, segment.count, call_.head_size,
        padded, sizes_.words, keep, staged_.get());
    K::to_panels(staged_.get(), padded, sizes_.words, values_.get());
  }

  void attend(const Segment& segment) {
    pack(segment);
    for (int64_t index = 0; index < blocks_.count(last_ - first_); ++index) {
      const RowBlock block = blocks_.at(index, first_, last_);
      const Visible visible = visible_in(segment, ranges_, block);
      if (visible.begin >= visible.end) continue;
      const int64_t group_head = kv_head_ * blocks_.group;
      stage_block<K>(
          call_.query, block, sample_, group_head, call_.head_size, sizes_, queries_.get());
      fill_row_ranges(call_, segment, ranges_, block, sizes_.rows, begin_.data(), end_.data());
      for (int64_t k = visible.begin; k < visible.end; k += kKeyBlock)
        attend_block(
            segment, block, index, k, round_up(std::min(kKeyBlock, visible.end - k), kLanes));
    }
  }

  void attend_block(
      const Segment& segment, const RowBlock& block, int64_t index, int64_t k, int64_t width) {
    const int64_t state = index * sizes_.rows, rows = round_up(block.rows(), kRowStep);
    const int64_t first_key = segment.first + k;
    K::multiply({
        .a = queries_.get(), .a_row = sizes_.words, .a_step = 1,
        .b = keys_.get() + k * sizes_.words, .b_panel = sizes_.words * kPanel,
        .c = scores_.get(), .c_stride = kDepth,
        .rows = rows, .columns = width, .depth = sizes_.words, .fresh = true,
    });
    if (call_.dropout.active)
      draw_block(call_, segment, block, sample_, kv_head_, first_key, keep_.get());
    float* acc = acc_.data() + state * sizes_.padded_head;
    softmax_tile(
        {
            .scores = scores_.get(), .rows = rows, .width = width, .first_key = first_key,
            .begin = begin_.data(), .end = end_.data(),
            .key_keep = masked_ ? key_keep_.get() + k : nullptr,
            .keep = call_.dropout.active ? keep_.get() : nullptr,
            .keep_scale = call_.keep_scale, .scale = call_.scale,
        },
        {peak_.data() + state, total_.data() + state, acc, sizes_.padded_head});
    const Narrowed p = K::narrow(scores_.get(), rows, width, plain_.get(), nullptr);
    K::multiply({
        .a = p.plain, .a_row = p.plain_row, .a_step = 1,
        .b = values_.get() + k / K::kPair * kPanel,
        .b_panel = segment.padded() / K::kPair * kPanel,
        .c = acc, .c_stride = sizes_.padded_head,
        .rows = rows, .columns = sizes_.padded_head, .depth = width / K::kPair, .fresh = false,
    });
  }

  // write(row of the state, head, row of the output, sums, 1 / total) for every row; zero for one that saw nothing.
  template <typename Write>
  void finish(float* lse, const Write& write) {
    for (int64_t index = 0; index < blocks_.count(last_ - first_); ++index) {
      const RowBlock block = blocks_.at(index, first_, last_);
      for (int64_t row = 0; row < block.rows(); ++row) {
        const int64_t state = index * sizes_.rows + row;
        const int64_t head = kv_head_ * blocks_.group + block.head + row / block.queries;
        const int64_t place = (sample_ * call_.heads + head) * call_.queries + block.query + row % block.queries;
        const float total = total_[state];
        lse[place] = static_cast<float>(peak_[state] + std::log(static_cast<double>(total)));
        write(state, head, place, acc_.data() + state * sizes_.padded_head, total == 0.0f ? 0.0f : 1.0f / total);
      }
    }
  }

  const PrefixCall& call_;
  const Ranges& ranges_;
  const RowBlocks& blocks_;
  const Sizes sizes_;
  const int64_t item_queries_;
  int64_t first_ = 0, last_ = 0, kv_head_ = 0, sample_ = 0;
  bool masked_ = false;
  std::unique_ptr<float[]> staged_, keys_, values_, queries_, scores_, plain_;
  std::unique_ptr<uint32_t[]> keep_, key_keep_;
  std::vector<int64_t> begin_, end_;
  std::vector<float> acc_, peak_, total_, gated_;
};

template <typename K>
void forward_as(const PrefixCall& call) {
  const Ranges ranges = ranges_of(call);
  const RowBlocks blocks(call);
  const int64_t queries = queries_per_item(call, blocks);
  const int64_t chunks = (call.queries + queries - 1) / queries;
  for_each_item(call.batch * call.kv_heads * chunks, [&] {
    return Forward<K>(call, ranges, blocks, queries);
  });
}

}  // namespace

void prefix_forward(const PrefixCall& call) {
  if (call.type == Type::kFloat32) return forward_as<FloatWords>(call);
#ifdef PK_NATIVE
  if (native_bfloat16()) return forward_as<PairWords>(call);
#endif
  forward_as<WideWords>(call);
}

}  // namespace pk
