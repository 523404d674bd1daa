// One pass over each activation: dy is read once, masked by dropout, for dh, d_up and the sums of its
// columns, then x once for d_down and dx = dpre down (+ dy). h is made again from pre; the mask is
// drawn again. A task is a chunk of one adapter's rows, with sums of its own.
//
// With dd = drop'(dy), G = dd^T h and C = the column sums of dd, per channel c:
//   d_up = scale_c G,  d_up_bias = scale_c C,  d_scale_c = sum_j up[c, j] G[c, j] + up_bias[c] C[c].
#include <memory>
#include <vector>

#include "adapter_groups.h"
#include "lowrank.h"
#include "lowrank_bf16.h"
#include "parts.h"

namespace pk {
namespace {

// What the chunks add up, one part of each for every chunk.
struct Sums {
  int64_t down_size, up_size, down_bias_size, up_bias_size;  // of a part; 0: not wanted
  Buffer<float> down, up, down_bias, up_bias;

  void allocate(int64_t parts) {
    down = uninitialized<float>(parts * down_size);
    up = uninitialized<float>(parts * up_size);
    down_bias = uninitialized<float>(parts * down_bias_size);
    up_bias = uninitialized<float>(parts * up_bias_size);
  }
};

template <typename K>
struct BackwardPlan {
  const AdapterBackward* call;
  const Task* tasks;  // chunks in the order of their parts, then rows without an adapter
  const Sums* sums;
  int64_t ranks, q_stride;
  float factor;  // of dh, beside what P holds
  const typename K::Work *p, *q;  // of each group
};

template <typename K>
PK_INLINE void backward_chunks(const BackwardPlan<K>& plan, Tickets& tickets) {
  using T = typename K::Element;
  using Work = typename K::Work;
  constexpr int64_t kRows = K::kRows;
  const AdapterBackward& c = *plan.call;
  const Sums& sums = *plan.sums;
  const int64_t ranks = plan.ranks, q_stride = plan.q_stride, features = c.features;
  const T *x = static_cast<const T*>(c.x.data), *dy = static_cast<const T*>(c.dy.data);
  T* dx = static_cast<T*>(c.dx);
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  const bool need_up = sums.up_size, need_ds = c.dx || c.d_down.data || c.d_down_bias.data;
  Lines<Work> v(kRows * kDepth), h(kRows * ranks), ds(kRows * ranks), ds_left(kRows * ranks);
  Lines<float> sum(kRows * ranks);
  // Eager's error of this sum is small: that of its terms, which this CPU may not make by fused
  // multiply-adds, is all that there is room for.
  Lines<double> bias_sum(ranks);
  Lines<uint32_t> keep(c.dropout ? kRows * kDepth : 0);
  for (int64_t number; tickets.take(&number);) {
    const auto [group, chunk] = plan.tasks[number];
    if (group == Task::kNone) {
      if (dx) copy_rows<T>(chunk, c.input_residual ? c.dy : Matrix{}, features, dx);
      continue;
    }
    const Work* p = plan.p + group * packed_size(features, ranks);
    const Work* q = c.dx ? plan.q + group * packed_size(c.rank, q_stride) : nullptr;
    float *down = sums.down.get() + number * sums.down_size, *up = sums.up.get() + number * sums.up_size;
    float* down_bias = sums.down_bias.get() + number * sums.down_bias_size;
    float* up_bias = sums.up_bias.get() + number * sums.up_bias_size;
    std::fill(bias_sum.begin(), bias_sum.end(), 0.0);
    std::fill_n(up_bias, sums.up_bias_size, 0.0f);
    // Without rows one block is left, whose sums are zero.
    for (int64_t begin = 0; begin == 0 || begin < chunk.count; begin += kRows) {
      const bool fresh = begin == 0;
      const Rows rows = chunk.part(begin, kRows);
      std::fill(h.begin(), h.end(), Work{});
      std::fill(ds.begin(), ds.end(), Work{});
      std::fill(sum.begin(), sum.end(), 0.0f);
      if (need_up)
        activate_rows<T>(
            c, rows,
            [&](int64_t m, int64_t j, int64_t count, const Activated& act) PK_INLINE_LAMBDA {
              Work values[kLanes];
              K::store_rounded(values, act.value);
              for (int64_t i = 0; i < count; ++i) h[K::at(m, j + i, ranks)] = values[i];
            });

      for (int64_t n = 0; n < features; n += kDepth) {
        const int64_t depth = std::min(kDepth, features - n);
        K::stage(dy + n, c.dy.stride, rows, depth, v.data());
        if (c.dropout) {
          draw_keep(dropout, rows, features, n, keep.data());
          K::apply_mask(keep.data(), rows.count, v.data());
        }
        if (need_ds)
          K::project(v.data(), p + K::at(n, 0, ranks), rows.count, depth, ranks, sum.data());
        if (need_up)
          K::gradient(v.data(), h.data(), rows.count, depth, ranks, fresh, up + n * ranks);
        if (sums.up_bias_size) add_column_sums(v.data(), rows.count, depth, up_bias + n);
      }
      if (!need_ds) continue;
      activate_rows<T>(
          c, rows, [&](int64_t m, int64_t j, int64_t count, const Activated& act) PK_INLINE_LAMBDA {
            Work values[kLanes];
            K::store_rounded(values, act.derivative * (load(&sum[m * ranks + j]) * plan.factor));
            for (int64_t i = 0; i < count; ++i) {
              ds[K::at(m, j + i, ranks)] = ds_left[m * ranks + j + i] = values[i];
              bias_sum[j + i] += to_float(values[i]);
            }
          });

      for (int64_t k = 0; k < features; k += kDepth) {
        const int64_t depth = std::min(kDepth, features - k);
        if (c.d_down.data) {
          K::stage(x + k, c.x.stride, rows, depth, v.data());
          K::gradient(v.data(), ds.data(), rows.count, depth, ranks, fresh, down + k * ranks);
        }
        if (c.dx)
          K::expand(
              ds_left.data(), ranks, q + tile_at(k, c.rank),
              {.before = c.input_residual ? dy + k : nullptr, .before_stride = c.dy.stride}, rows,
              c.rank, depth, dx + k, features);
      }
    }
    for (int64_t j = 0; j < ranks; ++j) down_bias[j] = static_cast<float>(bias_sum[j]);
  }
}

// Clones of one name would be one function even across files, anonymous namespace or not.
#define PK_DRIVER(name, K)                                                                  \
  PK_CLONES void adapter_backward_##name(const BackwardPlan<K>& plan, Tickets& tickets) {   \
    backward_chunks<K>(plan, tickets);                                                      \
  }

PK_DRIVER(float, Portable<float>)
PK_DRIVER(bfloat16, Portable<bfloat16>)
#ifdef PK_NATIVE
PK_DRIVER(native, NativeBFloat16)
#endif

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

// The gradients of adapter `number` from its chunks, `parts` of them from `part` on.
template <typename T>
void finish(
    const AdapterBackward& c, const Sums& sums, int64_t ranks, int64_t number, int64_t part,
    int64_t parts) {
  float *down = sums.down.get() + part * sums.down_size, *up = sums.up.get() + part * sums.up_size;
  float* down_bias = sums.down_bias.get() + part * sums.down_bias_size;
  float* up_bias = sums.up_bias.get() + part * sums.up_bias_size;
  sum_parts(down, parts, sums.down_size);
  sum_parts(up, parts, sums.up_size);
  sum_parts(down_bias, parts, sums.down_bias_size);
  sum_parts(up_bias, parts, sums.up_bias_size);
  Buffer<float> d_scale;
  if (c.d_scale) d_scale = uninitialized<float>(c.features);
  torch::stable::parallel_for(0, c.features, 256, [&](int64_t begin, int64_t end) {
    finish_up<T>(c, ranks, up, up_bias, d_scale.get(), begin, end);
  });
  if (c.d_scale && c.channels) std::copy_n(d_scale.get(), c.features, c.d_scale);
  if (c.d_scale && !c.channels) {
    double sum = 0.0;
    for (int64_t n = 0; n < c.features; ++n) sum += d_scale[n];
    *c.d_scale = static_cast<float>(sum);
  }
  // d_down is the transpose of what was summed.
  write_gradient(down, 1, ranks, c.rank, c.features, c.d_down.of(number, c.rank * c.features));
  write_gradient(up, ranks, 1, c.features, c.rank, c.d_up.of(number, c.rank * c.features));
  write_gradient(down_bias, 0, 1, 1, c.rank, c.d_down_bias.of(number, c.rank));
  write_gradient(up_bias, 0, 1, 1, c.features, c.d_up_bias.of(number, c.features));
}

// up as P of dh = dd up, its rows scaled where every channel has its own scale.
template <typename K>
auto packed_up(const AdapterBackward& c, int64_t ranks, const std::vector<int64_t>& numbers) {
  using T = typename K::Element;
  if (!c.channels) return packed_p<K>(c.up, c.rank, 1, c.features, c.rank, ranks, numbers);
  const auto scaled = uninitialized<T>(c.features * c.rank);
  const T* up = static_cast<const T*>(c.up);
  for (int64_t n = 0; n < c.features; ++n)
    for (int64_t j = 0; j < c.rank; ++j)
      from_float(to_float(up[n * c.rank + j]) * c.channels[n], &scaled[n * c.rank + j]);
  return packed_p<K>(scaled.get(), c.rank, 1, c.features, c.rank, ranks);
}

template <typename K>
void backward_as(const AdapterBackward& c, void (*chunks)(const BackwardPlan<K>&, Tickets&)) {
  const int64_t ranks = round_up(c.rank, kLanes), q_stride = round_up(c.features, kDepth);
  const int64_t size = round_up(c.features, kGradientRows) * ranks;
  const Grouping grouping(c);
  const int64_t groups = grouping.count();
  const auto p = packed_up<K>(c, ranks, grouping.numbers);
  Buffer<typename K::Work> q;
  if (c.dx) q = packed_q<K>(c.down, c.features, 1, c.rank, c.features, q_stride, grouping.numbers);
  Sums sums{};
  sums.down_size = c.d_down.data ? size : 0;
  sums.up_size = c.d_up.data || c.d_scale ? size : 0;
  sums.down_bias_size = ranks;
  sums.up_bias_size = c.d_up_bias.data || (c.d_scale && c.up_bias) ? c.features : 0;
  const int64_t part = (sums.down_size + sums.up_size) * static_cast<int64_t>(sizeof(float));

  std::vector<Task> tasks;
  std::vector<int64_t> first_parts;
  for (int64_t group = 0; group < groups; ++group) {
    const Rows& rows = grouping.rows[group];
    const Chunks split = chunks_of(rows.count, c.tokens, K::kRows, part);
    first_parts.push_back(static_cast<int64_t>(tasks.size()));
    for (int64_t chunk = 0; chunk < split.count; ++chunk) {
      const int64_t most = split.blocks_per_chunk * K::kRows;
      tasks.push_back({group, rows.part(chunk * most, most)});
    }
  }
  first_parts.push_back(static_cast<int64_t>(tasks.size()));
  sums.allocate(first_parts.back());
  add_rest(grouping, &tasks);
  const BackwardPlan<K> plan{
      &c, tasks.data(), &sums, ranks, q_stride, (c.channels ? 1.0f : c.scale) * c.keep_scale,
      p.get(), q.get()};
  share_out(static_cast<int64_t>(tasks.size()), [&](Tickets& tickets) { chunks(plan, tickets); });

  const auto finish_group = [&](int64_t group) {
    finish<typename K::Element>(
        c, sums, ranks, grouping.numbers[group], first_parts[group],
        first_parts[group + 1] - first_parts[group]);
  };
  // With few groups the threads share each one's elements.
  if (groups < torch::stable::get_num_threads()) {
    for (int64_t group = 0; group < groups; ++group) finish_group(group);
  } else {
    share_out(groups, [&](Tickets& tickets) {
      for (int64_t group; tickets.take(&group);) finish_group(group);
    });
  }
  for (const int64_t number : grouping.unused) {
    set_zero(c.d_down.of(number, c.rank * c.features), c.rank * c.features);
    set_zero(c.d_up.of(number, c.rank * c.features), c.rank * c.features);
    set_zero(c.d_down_bias.of(number, c.rank), c.rank);
    set_zero(c.d_up_bias.of(number, c.features), c.features);
  }
}

}  // namespace

void adapter_backward(const AdapterBackward& call) {
  if (call.type == Type::kFloat32) return backward_as<Portable<float>>(call, adapter_backward_float);
#ifdef PK_NATIVE
  if (native_bfloat16()) return backward_as<NativeBFloat16>(call, adapter_backward_native);
#endif
  backward_as<Portable<bfloat16>>(call, adapter_backward_bfloat16);
}

}  // namespace pk
