// Backward: an item is one key head, some samples and a chunk of queries. With the softmax of the whole
// row (lse) and delta = d_out out, every block of keys stands alone:
//
//   p = exp(s - lse)   ds = p (d_out v - delta + d_lse) scale
//   dv += p d_out      dk += ds q      dq += ds k
//
// Gradients of keys are summed over the rows of an item, those of a shared prefix over its samples too;
// what several items add to is added in the order of the items.
#include <cmath>

#include "prefix_parts.h"
#include "prefix_tiles.h"

namespace pk {
namespace {

template <typename K>
class Backward {
 public:
  using T = typename K::Element;

  Backward(const PrefixCall& call, const PrefixGradients& to, const BackwardPlan& plan)
      : call_(call),
        to_(to),
        plan_(plan),
        tiles_(call, plan.ranges),
        sizes_(tiles_.sizes),
        values_(words(sizes_.keys * sizes_.words)),
        key_panels_(words(sizes_.keys / K::kPair * tiles_.panel_columns)),
        d_outs_(words(sizes_.rows * sizes_.words)),
        query_panels_(words(sizes_.rows / K::kPair * tiles_.panel_columns)),
        d_out_panels_(words(sizes_.rows / K::kPair * tiles_.panel_columns)),
        products_(words(sizes_.rows * kDepth)),
        transposed_(words(K::kPair == 1 ? 0 : sizes_.rows * kDepth / 2)),
        d_keys_(words(sizes_.keys * sizes_.padded_head)),
        d_values_(words(sizes_.keys * sizes_.padded_head)),
        lse_(sizes_.rows),
        delta_(sizes_.rows),
        d_lse_(sizes_.rows),
        factor_(sizes_.rows) {
    rows_.resize(tiles_.blocks.count(std::min(plan.queries, call.queries)) * sizes_.rows);
    d_query_.resize(to.d_query ? rows_.size() * sizes_.padded_head : 0);
  }

  void operator()(int64_t item) {
    query_chunk_ = item % plan_.query_chunks;
    tiles_.kv_head = item / plan_.query_chunks % call_.kv_heads;
    const int64_t samples = item / plan_.query_chunks / call_.kv_heads;
    tiles_.first = query_chunk_ * plan_.queries;
    tiles_.last = std::min(call_.queries, tiles_.first + plan_.queries);
    const int64_t begin = samples * plan_.samples;
    const int64_t end = std::min(call_.batch, begin + plan_.samples);
    for (int64_t sample = begin; sample < end; ++sample) {
      tiles_.sample = sample;
      const int64_t part = call_.shared ? samples * plan_.query_chunks + query_chunk_
                                        : query_chunk_ * call_.batch + sample;
      d_prefix_key_ = prefix_part(plan_.d_prefix_key.get(), part);
      d_prefix_value_ = prefix_part(plan_.d_prefix_value.get(), part);
      for (float* sums : {d_prefix_key_, d_prefix_value_})
        if (sums && (!call_.shared || sample == begin))
          std::fill_n(sums, plan_.padded_prefix * sizes_.padded_head, 0.0f);
      take_sample();
    }
  }

 private:
  // A row's softmax over one range of keys, or over both: lse as forward left it, the sums of the
  // weighing pass, and the factor and delta of the gradients.
  struct Softmax {
    float lse, total, dot, factor, delta, d_lse;
  };
  struct Row {
    Softmax sequence, prefix;
  };

  float* prefix_part(float* parts, int64_t part) const {
    const int64_t matrix = part * call_.kv_heads + tiles_.kv_head;
    return parts ? parts + matrix * plan_.padded_prefix * sizes_.padded_head : nullptr;
  }

  void take_sample() {
    const std::vector<Segment> prefix = prefix_segments(call_);
    const std::vector<Segment> sequence =
        sequence_segments(call_, plan_.ranges, tiles_.first, tiles_.last);
    take_rows();
    if (plan_.weighs) {
      for (const Segment& segment : prefix) weigh(segment);
      for (const Segment& segment : sequence) weigh(segment);
      weigh_rows();
    }
    std::fill(d_query_.begin(), d_query_.end(), 0.0f);
    if (to_.d_query || d_prefix_key_ || d_prefix_value_)
      for (const Segment& segment : prefix) add_gradients(segment);
    if (to_.d_query || to_.d_key || to_.d_value) {
      int64_t written = 0;
      for (const Segment& segment : sequence) {
        std::fill_n(d_keys_.get(), segment.padded() * sizes_.padded_head, 0.0f);
        std::fill_n(d_values_.get(), segment.padded() * sizes_.padded_head, 0.0f);
        add_gradients(segment);
        write_keys(written, segment.first, nullptr, nullptr);
        written = segment.first + segment.count;
        write_keys(segment.first, written, d_keys_.get(), d_values_.get());
      }
      write_keys(written, call_.keys, nullptr, nullptr);
    }
    if (!to_.d_query) return;
    tiles_.for_each_row([&](int64_t row, int64_t head, int64_t query) {
      T* to = static_cast<T*>(to_.d_query) + tiles_.place_of(head, query) * call_.head_size;
      write_row(d_query_.data() + row * sizes_.padded_head, to);
    });
  }

  void take_rows() {
    tiles_.for_each_row([&](int64_t row, int64_t head, int64_t query) {
      const int64_t place = tiles_.place_of(head, query);
      const T* out = static_cast<const T*>(call_.out) + place * call_.head_size;
      const T* d_out = row_at<T>(to_.d_out, tiles_.sample, head, query);
      const float d_lse = to_.d_lse ? to_.d_lse[place] : 0.0f;
      const float delta = plan_.weighs ? 0.0f : dot(d_out, out, call_.head_size);
      rows_[row].sequence = {call_.lse[place], 0.0f, 0.0f, 1.0f, delta, d_lse};
      rows_[row].prefix = rows_[row].sequence;
      if (!call_.gate) return;
      rows_[row].prefix.lse = call_.prefix_lse[place];
      rows_[row].prefix.d_lse = 0.0f;
    });
  }

  // The sums of the weighing pass become factor and delta.
  void weigh_rows() {
    tiles_.for_each_row([&](int64_t at, int64_t head, int64_t query) {
      Row& row = rows_[at];
      if (!call_.gate) {
        row.prefix.total = row.sequence.total += row.prefix.total;
        row.prefix.dot = row.sequence.dot += row.prefix.dot;
      }
      for (Softmax* softmax : {&row.sequence, &row.prefix}) {
        softmax->factor = softmax->total == 0.0f ? 0.0f : 1.0f / softmax->total;
        softmax->delta = softmax->dot * softmax->factor;
      }
      if (plan_.dots) plan_.dots[tiles_.place_of(head, query)] = row.prefix.delta;
      if (call_.gate) row.prefix.factor *= std::tanh(call_.gate[head]);
    });
  }

  void pack(const Segment& segment) {
    tiles_.pack_keys(segment);
    if (to_.d_query)
      K::to_panels(tiles_.staged.get(), segment.padded(), sizes_.words, key_panels_.get());
    tiles_.stage(segment.prefix ? call_.prefix_value : call_.value, segment);
    transpose_to_panels(tiles_.staged.get(), segment.padded(), sizes_.words, values_.get());
  }

  Softmax& softmax_of(const Segment& segment, int64_t row) {
    return segment.prefix ? rows_[row].prefix : rows_[row].sequence;
  }

  void open_block(const Segment& segment, const RowBlock& block, int64_t index) {
    tiles_.stage_rows(to_.d_out, block, d_outs_.get());
    for (int64_t i = 0; i < block.rows(); ++i) {
      const Softmax& softmax = softmax_of(segment, index * sizes_.rows + i);
      lse_[i] = softmax.lse;
      delta_[i] = softmax.delta;
      d_lse_[i] = softmax.d_lse;
      factor_[i] = softmax.factor;
    }
  }

  // d_out times the values.
  void make_products(const ScoreTile& tile, int64_t k) {
    tiles_.multiply_keys(d_outs_.get(), tile.rows, values_.get(), k, tile.width, products_.get());
  }

  void weigh(const Segment& segment) {
    pack(segment);
    tiles_.for_each_tile(
        segment,
        [&](const RowBlock& block, int64_t index) { open_block(segment, block, index); },
        [&](const ScoreTile& tile, int64_t index, int64_t k) {
          make_products(tile, k);
          weigh_tile(tile, lse_.data(), products_.get(), delta_.data(), factor_.data());
          for (int64_t i = 0; i < tile.rows; ++i) {
            Softmax& softmax = softmax_of(segment, index * sizes_.rows + i);
            softmax.dot += delta_[i];
            softmax.total += factor_[i];
          }
        });
  }

  void add_gradients(const Segment& segment) {
    pack(segment);
    float* d_keys = segment.prefix ? d_prefix_key_ : to_.d_key ? d_keys_.get() : nullptr;
    float* d_values = segment.prefix ? d_prefix_value_ : to_.d_value ? d_values_.get() : nullptr;
    const int64_t start = segment.prefix ? segment.first : 0;
    tiles_.for_each_tile(
        segment,
        [&](const RowBlock& block, int64_t index) {
          open_block(segment, block, index);
          const auto pack_rows = [&](const float* rows, float* panels) {
            K::to_panels(rows, sizes_.rows, sizes_.words, panels);
          };
          if (d_keys) pack_rows(tiles_.queries.get(), query_panels_.get());
          if (d_values) pack_rows(d_outs_.get(), d_out_panels_.get());
        },
        [&](const ScoreTile& tile, int64_t index, int64_t k) {
          const int64_t place = (start + k) * sizes_.padded_head;
          add_tile(
              segment, tile, index, k, d_keys ? d_keys + place : nullptr,
              d_values ? d_values + place : nullptr);
        });
  }

  void add_tile(
      const Segment& segment, const ScoreTile& tile, int64_t index, int64_t k, float* d_keys,
      float* d_values) {
    const bool wants_scores = d_keys || to_.d_query;
    if (wants_scores) make_products(tile, k);
    gradient_tile(
        tile, {lse_.data(), delta_.data(), d_lse_.data(), factor_.data()},
        wants_scores ? products_.get() : nullptr);
    if (d_values) {
      const Narrowed p =
          K::narrow(tile.scores, tile.rows, tile.width, nullptr, transposed_.get());
      add_rows(p, tile, d_out_panels_.get(), d_values);
    }
    if (!wants_scores) return;
    const Narrowed ds = K::narrow(
        products_.get(), tile.rows, tile.width, to_.d_query ? tiles_.plain.get() : nullptr,
        d_keys ? transposed_.get() : nullptr);
    if (d_keys) add_rows(ds, tile, query_panels_.get(), d_keys);
    if (to_.d_query)
      tiles_.add_keys(
          ds, tile, segment, key_panels_.get(), k,
          d_query_.data() + index * sizes_.rows * sizes_.padded_head);
  }

  // sums[width, padded head] += factors[rows, width] transposed times the packed rows.
  void add_rows(const Narrowed& factors, const ScoreTile& tile, const float* panels, float* sums) {
    K::multiply({
        .a = factors.transposed, .a_row = 1, .a_step = factors.transposed_step,
        .b = panels, .b_panel = sizes_.rows / K::kPair * kPanel,
        .c = sums, .c_stride = sizes_.padded_head,
        .rows = tile.width, .columns = sizes_.padded_head, .depth = tile.rows / K::kPair,
        .fresh = false,
    });
  }

  // Keys [begin, end) get these sums, or zeros, in the gradient itself or in the part of the chunk.
  void write_keys(int64_t begin, int64_t end, const float* d_keys, const float* d_values) {
    const int64_t head = (tiles_.sample * call_.kv_heads + tiles_.kv_head) * call_.keys;
    const int64_t part = query_chunk_ * call_.batch * call_.kv_heads * call_.keys;
    const auto write = [&](const float* sums, void* gradient, float* parts) {
      for (int64_t j = begin; gradient && j < end; ++j) {
        const float* from = sums ? sums + (j - begin) * sizes_.padded_head : nullptr;
        if (parts) {
          write_row(from, parts + (part + head + j) * call_.head_size);
        } else {
          write_row(from, static_cast<T*>(gradient) + (head + j) * call_.head_size);
        }
      }
    };
    write(d_keys, to_.d_key, plan_.d_key.get());
    write(d_values, to_.d_value, plan_.d_value.get());
  }

  template <typename To>
  void write_row(const float* from, To* to) const {
    for (int64_t c = 0; c < call_.head_size; ++c) from_float(from ? from[c] : 0.0f, to + c);
  }

  const PrefixCall& call_;
  const PrefixGradients& to_;
  const BackwardPlan& plan_;
  Tiles<K> tiles_;
  const Sizes& sizes_;
  int64_t query_chunk_ = 0;
  float *d_prefix_key_ = nullptr, *d_prefix_value_ = nullptr;  // of the part; null: not wanted
  Buffer<float> values_, key_panels_, d_outs_, query_panels_, d_out_panels_, products_,
      transposed_, d_keys_, d_values_;
  std::vector<float> lse_, delta_, d_lse_, factor_, d_query_;
  std::vector<Row> rows_;
};

template <typename K>
void backward_as(const PrefixCall& call, const PrefixGradients& to) {
  const BackwardPlan plan(call, to);
  for_each_item(plan.items(call), [&] { return Backward<K>(call, to, plan); });
  plan.finish(call, to);
}

}  // namespace

void prefix_backward(const PrefixCall& call, const PrefixGradients& gradients) {
  if (call.type == Type::kFloat32) return backward_as<FloatWords>(call, gradients);
#ifdef PK_NATIVE
  if (native_bfloat16()) return backward_as<PairWords>(call, gradients);
#endif
  backward_as<WideWords>(call, gradients);
}

}  // namespace pk
