// One pass over each activation per direction, in blocks of rows that stay in the second-level cache.
//
// Forward: pre = x down^T + b and h = act(pre) of a block, then y = residual + scale * drop(h up^T + b).
// Backward: dy is read once, masked by dropout, for dh, d_up and the sums of its columns, then x once
// for d_down and dx = dpre down (+ dy). h is made again from pre; the mask is drawn again.
//
// With dd = drop'(dy), G = dd^T h and C = the column sums of dd, per channel c:
//   d_up = scale_c G,  d_up_bias = scale_c C,  d_scale_c = sum_j up[c, j] G[c, j] + up_bias[c] C[c].
#include "adapter.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "lowrank.h"
#include "lowrank_bf16.h"
#include "pack.h"
#include "parts.h"

namespace pk {
namespace {

template <typename K>
struct ForwardPlan {
  const AdapterForward* call;
  int64_t ranks, q_stride;
  const typename K::Work *p, *q;
  const float *down_bias, *up_bias, *factor;
};

template <typename K>
PK_INLINE void forward_blocks(const ForwardPlan<K>& plan, int64_t begin, int64_t end) {
  using T = typename K::Element;
  using Work = typename K::Work;
  constexpr int64_t kRows = K::kForwardRows;
  const AdapterForward& c = *plan.call;
  const int64_t ranks = plan.ranks, features = c.features;
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  std::vector<Work> v(kRows * kDepth), h(kRows * ranks);
  std::vector<float> sum(kRows * ranks);
  std::vector<uint32_t> keep(c.dropout ? kRows * kDepth : 0);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRows, rows = std::min(kRows, c.tokens - first);
    const T* x = static_cast<const T*>(c.x.data) + first * c.x.stride;
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t k = 0; k < features; k += kDepth) {
      const int64_t depth = std::min(kDepth, features - k);
      K::stage(x + k, c.x.stride, rows, depth, v.data());
      K::project(v.data(), plan.p + K::at(k, 0, ranks), rows, depth, ranks, sum.data());
    }
    T* pre = static_cast<T*>(c.pre) + first * c.rank;
    with_activation(c.activation, [&](auto activation) PK_INLINE_LAMBDA {
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t j = 0; j < c.rank; ++j) {
          const float before = rounded<T>(sum[m * ranks + j] + plan.down_bias[j]);
          from_float(before, pre + m * c.rank + j);
          h[m * ranks + j] = K::from(rounded<T>(activate(activation, before).value));
        }
    });
    const T* residual = static_cast<const T*>(c.residual.data);
    T* y = static_cast<T*>(c.y) + first * features;
    const int64_t step = c.dropout ? kDepth : features;  // the mask lies in pieces
    for (int64_t n = 0; n < features; n += step) {
      if (c.dropout) draw_keep(dropout, first, rows, features, n, keep.data());
      K::expand(
          h.data(), ranks, plan.q + K::at(0, n, plan.q_stride), plan.q_stride,
          {.bias = plan.up_bias + n,
           .keep = c.dropout ? keep.data() : nullptr,
           .keep_stride = kDepth,
           .factor = plan.factor ? plan.factor + n : nullptr,
           .before = residual ? residual + first * c.residual.stride + n : nullptr,
           .before_stride = c.residual.stride},
          rows, c.rank, std::min(step, features - n), y + n, features);
    }
  }
}

template <typename K>
struct BackwardPlan {
  const AdapterBackward* call;
  int64_t ranks, q_stride, blocks_per_chunk, down_rows, up_rows;
  float factor;  // of dh, beside what P holds
  bool sums;
  const typename K::Work *p, *q;
  float *down, *up, *down_bias, *up_bias;  // one part per chunk
};

// ds from sum = dd up of a block, and h from pre; both for the gradients, ds for dx too.
template <typename K>
PK_INLINE void bottleneck_rows(
    const BackwardPlan<K>& plan, const typename K::Element* pre, int64_t rows, bool derive,
    const float* sum, typename K::Work* h, typename K::Work* ds, typename K::Work* ds_left,
    float* down_bias) {
  using T = typename K::Element;
  const AdapterBackward& c = *plan.call;
  with_activation(c.activation, [&](auto activation) PK_INLINE_LAMBDA {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < c.rank; ++j) {
        const Activated act = activate(activation, to_float(pre[m * c.rank + j]));
        const int64_t place = K::at(m, j, plan.ranks);
        if (!derive) {
          h[place] = K::from(rounded<T>(act.value));
          continue;
        }
        const float slope = act.derivative * (sum[m * plan.ranks + j] * plan.factor);
        const float value = rounded<T>(slope);
        ds[place] = ds_left[m * plan.ranks + j] = K::from(value);
        down_bias[j] += value;
      }
  });
}

template <typename K>
PK_INLINE void backward_chunk(const BackwardPlan<K>& plan, int64_t chunk) {
  using T = typename K::Element;
  using Work = typename K::Work;
  constexpr int64_t kRows = K::kRows;
  const AdapterBackward& c = *plan.call;
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  const int64_t ranks = plan.ranks, features = c.features;
  const bool need_up = plan.up_rows, need_ds = c.dx || c.d_down.data || c.d_down_bias.data;
  std::vector<Work> v(kRows * kDepth), h(kRows * ranks), ds(kRows * ranks), ds_left(kRows * ranks);
  std::vector<float> sum(kRows * ranks), block_bias(ranks);
  std::vector<uint32_t> keep(c.dropout ? kRows * kDepth : 0);
  float* down = plan.down + chunk * plan.down_rows * ranks;
  float* up = plan.up + chunk * plan.up_rows * ranks;
  float* down_bias = plan.down_bias + chunk * ranks;
  float* up_bias = plan.up_bias + chunk * (plan.sums ? features : 0);
  std::fill_n(down_bias, ranks, 0.0f);
  if (plan.sums) std::fill_n(up_bias, features, 0.0f);
  const int64_t begin = chunk * plan.blocks_per_chunk;
  const int64_t end = std::min((c.tokens + kRows - 1) / kRows, begin + plan.blocks_per_chunk);
  for (int64_t block = begin; block < end; ++block) {
    const bool fresh = block == begin;
    const int64_t first = block * kRows, rows = std::min(kRows, c.tokens - first);
    const T* pre = static_cast<const T*>(c.pre) + first * c.rank;
    std::fill(h.begin(), h.end(), Work{});
    std::fill(ds.begin(), ds.end(), Work{});
    std::fill(sum.begin(), sum.end(), 0.0f);
    std::fill(block_bias.begin(), block_bias.end(), 0.0f);
    if (need_up)
      bottleneck_rows(plan, pre, rows, false, nullptr, h.data(), nullptr, nullptr, nullptr);

    const T* dy = static_cast<const T*>(c.dy.data) + first * c.dy.stride;
    for (int64_t n = 0; n < features; n += kDepth) {
      const int64_t depth = std::min(kDepth, features - n);
      K::stage(dy + n, c.dy.stride, rows, depth, v.data());
      if (c.dropout) {
        draw_keep(dropout, first, rows, features, n, keep.data());
        K::apply_mask(keep.data(), rows, v.data());
      }
      if (need_ds) K::project(v.data(), plan.p + K::at(n, 0, ranks), rows, depth, ranks, sum.data());
      if (need_up) K::gradient(v.data(), h.data(), rows, depth, ranks, fresh, up + n * ranks);
      if (plan.sums) add_column_sums(v.data(), rows, depth, up_bias + n);
    }
    if (!need_ds) continue;
    bottleneck_rows(
        plan, pre, rows, true, sum.data(), nullptr, ds.data(), ds_left.data(), block_bias.data());
    for (int64_t j = 0; j < ranks; ++j) down_bias[j] += block_bias[j];

    const T* x = static_cast<const T*>(c.x.data) + first * c.x.stride;
    for (int64_t k = 0; k < features; k += kDepth) {
      const int64_t depth = std::min(kDepth, features - k);
      if (c.d_down.data) {
        K::stage(x + k, c.x.stride, rows, depth, v.data());
        K::gradient(v.data(), ds.data(), rows, depth, ranks, fresh, down + k * ranks);
      }
      if (c.dx)
        K::expand(
            ds_left.data(), ranks, plan.q + K::at(0, k, plan.q_stride), plan.q_stride,
            {.before = c.input_residual ? dy + k : nullptr, .before_stride = c.dy.stride}, rows,
            c.rank, depth, static_cast<T*>(c.dx) + first * features + k, features);
    }
  }
}

// Clones of one name would be one function even across files, anonymous namespace or not.
#define PK_DRIVERS(name, K)                                                                 \
  PK_CLONES void adapter_forward_##name(const ForwardPlan<K>& plan, int64_t begin, int64_t end) {   \
    forward_blocks<K>(plan, begin, end);                                                    \
  }                                                                                         \
  PK_CLONES void adapter_backward_##name(const BackwardPlan<K>& plan, int64_t begin, int64_t end) { \
    for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<K>(plan, chunk);       \
  }

PK_DRIVERS(float, Portable<float>)
PK_DRIVERS(bfloat16, Portable<bfloat16>)
#ifdef PK_NATIVE
PK_DRIVERS(native, NativeBFloat16)
#endif

// [columns] of T or null widened to [stride], zeros beyond and instead of null.
template <typename T>
std::unique_ptr<float[]> vector_of(const void* from, int64_t columns, int64_t stride) {
  return packed<Portable<T>>(from, 0, 1, 1, from ? columns : 0, stride);
}

template <typename Run>
void in_parallel(int64_t count, const Run& run) {
  if (count == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, count, 1, run);
  }
}

template <typename K>
void forward_as(const AdapterForward& c, void (*blocks)(const ForwardPlan<K>&, int64_t, int64_t)) {
  using T = typename K::Element;
  const int64_t ranks = round_up(c.rank, kLanes), q_stride = round_up(c.features, kDepth);
  const auto p = packed<K>(c.down, 1, c.features, c.features, c.rank, ranks);
  const auto q = packed<K>(c.up, 1, c.rank, c.rank, c.features, q_stride);
  const auto down_bias = vector_of<T>(c.down_bias, c.rank, ranks);
  const auto up_bias = vector_of<T>(c.up_bias, c.features, q_stride);
  std::unique_ptr<float[]> factor;
  if (c.channels || c.scale * c.keep_scale != 1.0f) {
    factor = uninitialized<float>(q_stride);
    for (int64_t n = 0; n < q_stride; ++n)
      factor[n] = (c.channels && n < c.features ? c.channels[n] : c.scale) * c.keep_scale;
  }
  const ForwardPlan<K> plan{&c, ranks, q_stride, p.get(), q.get(), down_bias.get(), up_bias.get(),
                            factor.get()};
  in_parallel(
      (c.tokens + K::kForwardRows - 1) / K::kForwardRows,
      [&](int64_t begin, int64_t end) { blocks(plan, begin, end); });
}

// Rows [begin, end) of G and C become those of d_up and d_up_bias; d_scale[c] is written.
template <typename T>
void finish_up(
    const AdapterBackward& c, int64_t ranks, float* up, float* up_bias, float* d_scale,
    int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(c.up);
  const T* bias = static_cast<const T*>(c.up_bias);
  for (int64_t n = begin; n < end; ++n) {
    if (d_scale) {
      float sum = bias ? to_float(bias[n]) * up_bias[n] : 0.0f;
      for (int64_t j = 0; j < c.rank; ++j) sum += to_float(weight[n * c.rank + j]) * up[n * ranks + j];
      d_scale[n] = sum * c.keep_scale;
    }
    const float factor = (c.channels ? c.channels[n] : c.scale) * c.keep_scale;
    if (c.d_up.data)
      for (int64_t j = 0; j < c.rank; ++j) up[n * ranks + j] *= factor;
    if (c.d_up_bias.data) up_bias[n] *= factor;
  }
}

// up as P of dh = dd up, its rows scaled where every channel has its own scale.
template <typename K>
auto packed_up(const AdapterBackward& c, int64_t ranks) {
  using T = typename K::Element;
  if (!c.channels) return packed<K>(c.up, c.rank, 1, c.features, c.rank, ranks);
  const auto scaled = uninitialized<T>(c.features * c.rank);
  const T* up = static_cast<const T*>(c.up);
  for (int64_t n = 0; n < c.features; ++n)
    for (int64_t j = 0; j < c.rank; ++j)
      from_float(to_float(up[n * c.rank + j]) * c.channels[n], &scaled[n * c.rank + j]);
  return packed<K>(scaled.get(), c.rank, 1, c.features, c.rank, ranks);
}

template <typename K>
void backward_as(const AdapterBackward& c, void (*chunks)(const BackwardPlan<K>&, int64_t, int64_t)) {
  const int64_t ranks = round_up(c.rank, kLanes), q_stride = round_up(c.features, kDepth);
  const int64_t height = round_up(c.features, kGradientRows);
  const auto p = packed_up<K>(c, ranks);
  std::unique_ptr<typename K::Work[]> q;
  if (c.dx) q = packed<K>(c.down, c.features, 1, c.rank, c.features, q_stride);
  BackwardPlan<K> plan{};
  plan.call = &c;
  plan.ranks = ranks;
  plan.q_stride = q_stride;
  plan.factor = (c.channels ? 1.0f : c.scale) * c.keep_scale;
  plan.p = p.get();
  plan.q = q.get();
  plan.down_rows = c.d_down.data ? height : 0;
  plan.up_rows = c.d_up.data || c.d_scale ? height : 0;
  plan.sums = c.d_up_bias.data || (c.d_scale && c.up_bias);
  const int64_t part = (plan.down_rows + plan.up_rows) * ranks * static_cast<int64_t>(sizeof(float));
  const Chunks split = chunks_of(c.tokens, K::kRows, part);
  plan.blocks_per_chunk = split.blocks_per_chunk;
  const auto down = uninitialized<float>(split.count * plan.down_rows * ranks);
  const auto up = uninitialized<float>(split.count * plan.up_rows * ranks);
  const auto down_bias = uninitialized<float>(split.count * ranks);
  const auto up_bias = uninitialized<float>(plan.sums ? split.count * c.features : 0);
  plan.down = down.get();
  plan.up = up.get();
  plan.down_bias = down_bias.get();
  plan.up_bias = up_bias.get();
  in_parallel(split.count, [&](int64_t begin, int64_t end) { chunks(plan, begin, end); });

  sum_parts(plan.down, split.count, plan.down_rows * ranks);
  sum_parts(plan.up, split.count, plan.up_rows * ranks);
  sum_parts(plan.down_bias, split.count, ranks);
  sum_parts(plan.up_bias, split.count, plan.sums ? c.features : 0);
  std::unique_ptr<float[]> d_scale;
  if (c.d_scale) d_scale = uninitialized<float>(c.features);
  torch::stable::parallel_for(0, c.features, 256, [&](int64_t begin, int64_t end) {
    finish_up<typename K::Element>(c, ranks, plan.up, plan.up_bias, d_scale.get(), begin, end);
  });
  if (c.d_scale && c.channels) std::copy_n(d_scale.get(), c.features, c.d_scale);
  if (c.d_scale && !c.channels) {
    double sum = 0.0;
    for (int64_t n = 0; n < c.features; ++n) sum += d_scale[n];
    *c.d_scale = static_cast<float>(sum);
  }
  // d_down is the transpose of what was summed.
  write_gradient(plan.down, 1, ranks, c.rank, c.features, c.d_down);
  write_gradient(plan.up, ranks, 1, c.features, c.rank, c.d_up);
  write_gradient(plan.down_bias, 0, 1, 1, c.rank, c.d_down_bias);
  write_gradient(plan.up_bias, 0, 1, 1, c.features, c.d_up_bias);
}

}  // namespace

void adapter_forward(const AdapterForward& call) {
  if (call.type == Type::kFloat32) return forward_as<Portable<float>>(call, adapter_forward_float);
#ifdef PK_NATIVE
  if (native_bfloat16()) return forward_as<NativeBFloat16>(call, adapter_forward_native);
#endif
  forward_as<Portable<bfloat16>>(call, adapter_forward_bfloat16);
}

void adapter_backward(const AdapterBackward& call) {
  if (call.type == Type::kFloat32) return backward_as<Portable<float>>(call, adapter_backward_float);
#ifdef PK_NATIVE
  if (native_bfloat16()) return backward_as<NativeBFloat16>(call, adapter_backward_native);
#endif
  backward_as<Portable<bfloat16>>(call, adapter_backward_bfloat16);
}

}  // namespace pk
