// Forward: an item is one key head of one sample and a chunk of its queries. Segment by segment, keys
// and values are packed and every block of rows moves its running softmax on.
#include <cmath>
#include <limits>

#include "prefix_tiles.h"

namespace pk {
namespace {

constexpr int64_t kItems = 64;        // wanted, for threads to share
constexpr int64_t kFewestRows = 512;  // of an item: fewer would pack keys too often
constexpr int64_t kMostRows = 2048;   // whose sums stay in the second-level cache

int64_t queries_per_item(const PrefixCall& call) {
  const RowBlocks blocks(call);
  const int64_t heads = std::max<int64_t>(1, call.batch * call.kv_heads);
  const int64_t rows = call.queries * blocks.group;
  const int64_t fewest = (rows + kMostRows - 1) / kMostRows;
  const int64_t most = std::max<int64_t>(1, rows / kFewestRows);
  const int64_t chunks = std::clamp((kItems + heads - 1) / heads, fewest, std::max(fewest, most));
  return round_up((call.queries + chunks - 1) / chunks, blocks.queries);
}

template <typename K>
class Forward {
 public:
  using T = typename K::Element;

  Forward(const PrefixCall& call, const Ranges& ranges, int64_t item_queries)
      : call_(call),
        tiles_(call, ranges),
        item_queries_(item_queries),
        values_(words(tiles_.sizes.keys / K::kPair * tiles_.panel_columns)) {
    const int64_t rows =
        tiles_.blocks.count(std::min(item_queries, call.queries)) * tiles_.sizes.rows;
    acc_.resize(rows * tiles_.sizes.padded_head);
    peak_.resize(rows);
    total_.resize(rows);
    if (call.gate) gated_.resize(acc_.size());
  }

  void operator()(int64_t item) {
    const int64_t chunks = (call_.queries + item_queries_ - 1) / item_queries_;
    tiles_.first = item % chunks * item_queries_;
    tiles_.last = std::min(call_.queries, tiles_.first + item_queries_);
    tiles_.kv_head = item / chunks % call_.kv_heads;
    tiles_.sample = item / chunks / call_.kv_heads;
    reset();
    for (const Segment& segment : prefix_segments(call_)) attend(segment);
    if (call_.gate) {
      finish(call_.prefix_lse, [&](int64_t row, int64_t head, int64_t, const float* sums, float by) {
        const float factor = std::tanh(call_.gate[head]) * by;
        float* to = gated_.data() + row * tiles_.sizes.padded_head;
        for (int64_t c = 0; c < call_.head_size; ++c) to[c] = factor * sums[c];
      });
      reset();
    }
    for (const Segment& segment :
         sequence_segments(call_, tiles_.ranges, tiles_.first, tiles_.last))
      attend(segment);
    finish(call_.lse, [&](int64_t row, int64_t head, int64_t place, const float* sums, float by) {
      T* to = static_cast<T*>(call_.out) + place * call_.head_size;
      // A closed gate adds nothing, not even the sign of a zero.
      if (call_.gate && call_.gate[head] != 0.0f) {
        const float* more = gated_.data() + row * tiles_.sizes.padded_head;
        for (int64_t c = 0; c < call_.head_size; ++c) from_float(sums[c] * by + more[c], to + c);
      } else {
        for (int64_t c = 0; c < call_.head_size; ++c) from_float(sums[c] * by, to + c);
      }
    });
  }

 private:
  void reset() {
    std::fill(acc_.begin(), acc_.end(), 0.0f);
    std::fill(peak_.begin(), peak_.end(), -std::numeric_limits<float>::infinity());
    std::fill(total_.begin(), total_.end(), 0.0f);
  }

  void attend(const Segment& segment) {
    const Sizes& sizes = tiles_.sizes;
    tiles_.pack_keys(segment);
    tiles_.stage(segment.prefix ? call_.prefix_value : call_.value, segment);
    K::to_panels(tiles_.staged.get(), segment.padded(), sizes.words, values_.get());
    tiles_.for_each_tile(
        segment, [](const RowBlock&, int64_t) {},
        [&](const ScoreTile& tile, int64_t index, int64_t k) {
          const int64_t row = index * sizes.rows;
          float* acc = acc_.data() + row * sizes.padded_head;
          softmax_tile(tile, {peak_.data() + row, total_.data() + row, acc, sizes.padded_head});
          const Narrowed p =
              K::narrow(tile.scores, tile.rows, tile.width, tiles_.plain.get(), nullptr);
          tiles_.add_keys(p, tile, segment, values_.get(), k, acc);
        });
  }

  // write(row of the item, head, row of the output, sums, 1 / total) for every row; 0 for 1 / total
  // where nothing was seen.
  template <typename Write>
  void finish(float* lse, const Write& write) {
    tiles_.for_each_row([&](int64_t row, int64_t head, int64_t query) {
      const int64_t place = tiles_.place_of(head, query);
      const float total = total_[row];
      lse[place] = static_cast<float>(peak_[row] + std::log(static_cast<double>(total)));
      write(
          row, head, place, acc_.data() + row * tiles_.sizes.padded_head,
          total == 0.0f ? 0.0f : 1.0f / total);
    });
  }

  const PrefixCall& call_;
  Tiles<K> tiles_;
  const int64_t item_queries_;
  Buffer<float> values_;
  std::vector<float> acc_, peak_, total_, gated_;
};

template <typename K>
void forward_as(const PrefixCall& call) {
  const Ranges ranges = ranges_of(call);
  const int64_t queries = queries_per_item(call);
  const int64_t chunks = (call.queries + queries - 1) / queries;
  for_each_item(
      call.batch * call.kv_heads * chunks, [&] { return Forward<K>(call, ranges, queries); });
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
