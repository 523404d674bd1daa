// Backward: an item is one key head, some samples and a chunk of queries. With the softmax of the whole
// row (lse) and delta = d_out out - d_lse, every block of keys stands alone:
//
//   p = exp(s - lse)   ds = p (d_out v - delta) scale   dv += p d_out   dk += ds q   dq += ds k
//
// Gradients of keys are summed over the rows of an item while their segment lies in the cache, those of
// a shared prefix over its samples too; what several items add to is added in the order of the items.
#include <cmath>

#include "prefix_parts.h"

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
        blocks_(call),
        sizes_(sizes_of<K>(call)),
        staged_(room(sizes_.keys * sizes_.words)),
        keys_(room(sizes_.keys * sizes_.words)),
        values_(room(sizes_.keys * sizes_.words)),
        key_panels_(room(sizes_.keys / K::kPair * panel_columns())),
        queries_(room(sizes_.rows * sizes_.words)),
        d_outs_(room(sizes_.rows * sizes_.words)),
        query_panels_(room(sizes_.rows / K::kPair * panel_columns())),
        d_out_panels_(room(sizes_.rows / K::kPair * panel_columns())),
        scores_(room(sizes_.rows * kDepth)),
        products_(room(sizes_.rows * kDepth)),
        plain_(room(K::kPair == 1 ? 0 : sizes_.rows * kDepth / 2)),
        transposed_(room(K::kPair == 1 ? 0 : sizes_.rows * kDepth / 2)),
        d_keys_(room(sizes_.keys * sizes_.padded_head)),
        d_values_(room(sizes_.keys * sizes_.padded_head)),
        keep_(uninitialized<uint32_t>(call.dropout.active ? sizes_.rows * kDepth : 0)),
        key_keep_(uninitialized<uint32_t>(sizes_.keys)),
        begin_(sizes_.rows),
        end_(sizes_.rows) {
    rows_.resize(blocks_.count(std::min(plan.queries, call.queries)) * sizes_.rows);
    d_query_.resize(to.d_query ? rows_.size() * sizes_.padded_head : 0);
  }

  void operator()(int64_t item) {
    query_chunk_ = item % plan_.query_chunks;
    kv_head_ = item / plan_.query_chunks % call_.kv_heads;
    const int64_t samples = item / plan_.query_chunks / call_.kv_heads;
    first_ = query_chunk_ * plan_.queries;
    last_ = std::min(call_.queries, first_ + plan_.queries);
    part_ = call_.shared ? samples * plan_.query_chunks + query_chunk_ : query_chunk_;
    const int64_t end = std::min(call_.batch, (samples + 1) * plan_.samples);
    for (sample_ = samples * plan_.samples; sample_ < end; ++sample_) {
      if (!call_.shared || sample_ == samples * plan_.samples) clear_prefix_parts();
      take_sample();
    }
  }

 private:
  // Per row of the item: what the softmax left, of the sequence or of all.
  struct Row {
    float lse, delta, prefix_lse, dot, factor;
  };

  static std::unique_ptr<float[]> room(int64_t words) { return uninitialized<float>(words); }
  int64_t panel_columns() const { return round_up(sizes_.padded_head, kPanel); }
  int64_t group_head() const { return kv_head_ * blocks_.group; }

  void clear_prefix_parts() {
    for (float* parts : {plan_.d_prefix_key.get(), plan_.d_prefix_value.get()})
      if (parts) std::fill_n(prefix_part(parts), plan_.padded_prefix * sizes_.padded_head, 0.0f);
  }

  float* prefix_part(float* parts) const {
    const int64_t sample = call_.shared ? part_ : part_ * call_.batch + sample_;
    return parts + (sample * call_.kv_heads + kv_head_) * plan_.padded_prefix * sizes_.padded_head;
  }

  void take_sample() {
    std::fill(d_query_.begin(), d_query_.end(), 0.0f);
    for_each_row([&](Row& row, int64_t head, int64_t query) {
      const int64_t place = place_of(head, query);
      const T* out = static_cast<const T*>(call_.out) + place * call_.head_size;
      row.lse = call_.lse[place];
      row.delta = dot(row_at<T>(to_.d_out, sample_, head, query), out, call_.head_size);
      row.dot = 0.0f;
      row.factor = call_.gate ? std::tanh(call_.gate[head]) : 1.0f;
      row.prefix_lse = call_.gate ? call_.prefix_lse[place] : row.lse;
    });
    const std::vector<Segment> prefix = prefix_segments(call_);
    if (call_.gate) {
      for (const Segment& segment : prefix) each_block(segment, Pass::kDots);
      for_each_row([&](Row& row, int64_t head, int64_t query) {
        row.delta -= row.factor * row.dot;
        if (plan_.dots) plan_.dots[place_of(head, query)] = row.dot;
      });
    }
    if (to_.d_lse)
      for_each_row([&](Row& row, int64_t head, int64_t query) {
        row.delta -= to_.d_lse[place_of(head, query)];
      });
    if (to_.d_query || to_.d_prefix_key.data || to_.d_prefix_value.data)
      for (const Segment& segment : prefix) each_block(segment, Pass::kGradients);
    if (to_.d_query || to_.d_key || to_.d_value) {
      int64_t written = 0;
      for (const Segment& segment : sequence_segments(call_, plan_.ranges, first_, last_)) {
        std::fill_n(d_keys_.get(), segment.padded() * sizes_.padded_head, 0.0f);
        std::fill_n(d_values_.get(), segment.padded() * sizes_.padded_head, 0.0f);
        each_block(segment, Pass::kGradients);
        write_keys(written, segment.first, nullptr, nullptr);
        written = segment.first + segment.count;
        write_keys(segment.first, written, d_keys_.get(), d_values_.get());
      }
      write_keys(written, call_.keys, nullptr, nullptr);
    }
    write_queries();
  }

  int64_t place_of(int64_t head, int64_t query) const {
    return (sample_ * call_.heads + head) * call_.queries + query;
  }

  template <typename Visit>
  void for_each_row(const Visit& visit) {
    for (int64_t index = 0; index < blocks_.count(last_ - first_); ++index) {
      const RowBlock block = blocks_.at(index, first_, last_);
      for (int64_t row = 0; row < block.rows(); ++row)
        visit(
            rows_[index * sizes_.rows + row], group_head() + block.head + row / block.queries,
            block.query + row % block.queries);
    }
  }

  enum class Pass { kDots, kGradients };

  void pack(const Segment& segment) {
    const Heads& key = segment.prefix ? call_.prefix_key : call_.key;
    const Heads& value = segment.prefix ? call_.prefix_value : call_.value;
    const uint32_t* keep = nullptr;
    masked_ = !segment.prefix && call_.key_mask;
    if (masked_) {
      fill_key_keep(call_, segment, sample_, key_keep_.get());
      keep = key_keep_.get();
    }
    const int64_t padded = segment.padded();
    const auto stage = [&](const Heads& from) {
      K::stage(
          row_at<T>(from, sample_, kv_head_, segment.first), from.row, segment.count,
          call_.head_size, padded, sizes_.words, keep, staged_.get());
    };
    stage(key);
    transpose_to_panels(staged_.get(), padded, sizes_.words, keys_.get());
    if (to_.d_query) K::to_panels(staged_.get(), padded, sizes_.words, key_panels_.get());
    stage(value);
    transpose_to_panels(staged_.get(), padded, sizes_.words, values_.get());
  }

  void each_block(const Segment& segment, Pass pass) {
    pack(segment);
    std::vector<float> lse(sizes_.rows), delta(sizes_.rows), factor(sizes_.rows);
    for (int64_t index = 0; index < blocks_.count(last_ - first_); ++index) {
      const RowBlock block = blocks_.at(index, first_, last_);
      const Visible visible = visible_in(segment, plan_.ranges, block);
      if (visible.begin >= visible.end) continue;
      const auto stage = [&](const Heads& from, float* rows, float* panels) {
        stage_block<K>(from, block, sample_, group_head(), call_.head_size, sizes_, rows);
        K::to_panels(rows, sizes_.rows, sizes_.words, panels);
      };
      stage(call_.query, queries_.get(), query_panels_.get());
      stage(to_.d_out, d_outs_.get(), d_out_panels_.get());
      fill_row_ranges(
          call_, segment, plan_.ranges, block, sizes_.rows, begin_.data(), end_.data());
      Row* rows = rows_.data() + index * sizes_.rows;
      const bool gated = segment.prefix && call_.gate;
      for (int64_t i = 0; i < block.rows(); ++i) {
        lse[i] = segment.prefix ? rows[i].prefix_lse : rows[i].lse;
        delta[i] = gated ? rows[i].dot : rows[i].delta;
        factor[i] = gated ? rows[i].factor : 1.0f;
      }
      const RowTerms terms{lse.data(), delta.data(), factor.data()};
      for (int64_t k = visible.begin; k < visible.end; k += kKeyBlock) {
        const int64_t width = round_up(std::min(kKeyBlock, visible.end - k), kLanes);
        const ScoreTile tile = make_scores(segment, block, k, width);
        if (pass == Pass::kDots) {
          make_products(tile, k);
          std::fill(delta.begin(), delta.end(), 0.0f);
          dot_tile(tile, terms, products_.get(), delta.data());
          for (int64_t i = 0; i < block.rows(); ++i) rows[i].dot += delta[i];
        } else {
          add_gradients(segment, tile, terms, index, k);
        }
      }
    }
  }

  ScoreTile make_scores(const Segment& segment, const RowBlock& block, int64_t k, int64_t width) {
    const int64_t first_key = segment.first + k, rows = round_up(block.rows(), kRowStep);
    K::multiply({
        .a = queries_.get(), .a_row = sizes_.words, .a_step = 1,
        .b = keys_.get() + k * sizes_.words, .b_panel = sizes_.words * kPanel,
        .c = scores_.get(), .c_stride = kDepth,
        .rows = rows, .columns = width, .depth = sizes_.words, .fresh = true,
    });
    if (call_.dropout.active)
      draw_block(call_, segment, block, sample_, kv_head_, first_key, keep_.get());
    return {
        .scores = scores_.get(), .rows = rows, .width = width, .first_key = first_key,
        .begin = begin_.data(), .end = end_.data(),
        .key_keep = masked_ ? key_keep_.get() + k : nullptr,
        .keep = call_.dropout.active ? keep_.get() : nullptr,
        .keep_scale = call_.keep_scale, .scale = call_.scale,
    };
  }

  // d_out times the values.
  void make_products(const ScoreTile& tile, int64_t k) {
    K::multiply({
        .a = d_outs_.get(), .a_row = sizes_.words, .a_step = 1,
        .b = values_.get() + k * sizes_.words, .b_panel = sizes_.words * kPanel,
        .c = products_.get(), .c_stride = kDepth,
        .rows = tile.rows, .columns = tile.width, .depth = sizes_.words, .fresh = true,
    });
  }

  void add_gradients(
      const Segment& segment, const ScoreTile& tile, const RowTerms& terms, int64_t index,
      int64_t k) {
    const bool wants_key = segment.prefix ? to_.d_prefix_key.data : to_.d_key;
    const bool wants_value = segment.prefix ? to_.d_prefix_value.data : to_.d_value;
    const bool wants_scores = wants_key || to_.d_query;
    if (wants_scores) make_products(tile, k);
    gradient_tile(tile, terms, wants_scores ? products_.get() : nullptr);
    const auto add_to_keys = [&](const Narrowed& factors, const float* panels, float* sums) {
      K::multiply({
          .a = factors.transposed, .a_row = 1, .a_step = factors.transposed_step,
          .b = panels, .b_panel = sizes_.rows / K::kPair * kPanel,
          .c = sums, .c_stride = sizes_.padded_head,
          .rows = tile.width, .columns = sizes_.padded_head, .depth = tile.rows / K::kPair,
          .fresh = false,
      });
    };
    const int64_t place = (segment.prefix ? segment.first + k : k) * sizes_.padded_head;
    if (wants_value) {
      const Narrowed p =
          K::narrow(scores_.get(), tile.rows, tile.width, nullptr, transposed_.get());
      float* sums = segment.prefix ? prefix_part(plan_.d_prefix_value.get()) : d_values_.get();
      add_to_keys(p, d_out_panels_.get(), sums + place);
    }
    if (!wants_scores) return;
    const Narrowed ds = K::narrow(
        products_.get(), tile.rows, tile.width, to_.d_query ? plain_.get() : nullptr,
        wants_key ? transposed_.get() : nullptr);
    if (wants_key) {
      float* sums = segment.prefix ? prefix_part(plan_.d_prefix_key.get()) : d_keys_.get();
      add_to_keys(ds, query_panels_.get(), sums + place);
    }
    if (to_.d_query)
      K::multiply({
          .a = ds.plain, .a_row = ds.plain_row, .a_step = 1,
          .b = key_panels_.get() + k / K::kPair * kPanel,
          .b_panel = segment.padded() / K::kPair * kPanel,
          .c = d_query_.data() + index * sizes_.rows * sizes_.padded_head,
          .c_stride = sizes_.padded_head,
          .rows = tile.rows, .columns = sizes_.padded_head, .depth = tile.width / K::kPair,
          .fresh = false,
      });
  }

  // Keys [begin, end) get these sums, or zeros, in the gradient itself or in the part of the chunk.
  void write_keys(int64_t begin, int64_t end, const float* d_keys, const float* d_values) {
    const int64_t head = (sample_ * call_.kv_heads + kv_head_) * call_.keys;
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

  void write_queries() {
    if (!to_.d_query) return;
    for_each_row([&](Row& row, int64_t head, int64_t query) {
      const int64_t from = (&row - rows_.data()) * sizes_.padded_head;
      write_row(
          d_query_.data() + from,
          static_cast<T*>(to_.d_query) + place_of(head, query) * call_.head_size);
    });
  }

  const PrefixCall& call_;
  const PrefixGradients& to_;
  const BackwardPlan& plan_;
  const RowBlocks blocks_;
  const Sizes sizes_;
  int64_t query_chunk_ = 0, kv_head_ = 0, first_ = 0, last_ = 0, sample_ = 0, part_ = 0;
  bool masked_ = false;
  std::unique_ptr<float[]> staged_, keys_, values_, key_panels_, queries_, d_outs_, query_panels_,
      d_out_panels_, scores_, products_, plain_, transposed_, d_keys_, d_values_;
  std::unique_ptr<uint32_t[]> keep_, key_keep_;
  std::vector<int64_t> begin_, end_;
  std::vector<Row> rows_;
  std::vector<float> d_query_;
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
