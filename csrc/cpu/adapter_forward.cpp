// One pass over each activation, in blocks of rows that stay in the second-level cache:
// pre = x down^T + b and h = act(pre) of a block, then y = residual + scale * drop(h up^T + b).
#include <memory>
#include <vector>

#include "adapter_groups.h"
#include "adapter_small.h"
#include "lowrank.h"
#include "lowrank_bf16.h"

namespace pk {
namespace {

template <typename K>
struct ForwardPlan {
  const AdapterForward* call;
  const Task* tasks;
  int64_t ranks, q_stride;
  const typename K::Work *p, *q;           // of each group
  const float *down_bias, *up_bias;        // of each group
  const float* factor;
};

template <typename K>
PK_INLINE void forward_blocks(const ForwardPlan<K>& plan, Tickets& tickets) {
  using T = typename K::Element;
  using Work = typename K::Work;
  constexpr int64_t kRows = K::kForwardRows;
  const AdapterForward& c = *plan.call;
  const int64_t ranks = plan.ranks, q_stride = plan.q_stride, features = c.features;
  const T *x = static_cast<const T*>(c.x.data), *residual = static_cast<const T*>(c.residual.data);
  T *pre = static_cast<T*>(c.pre), *y = static_cast<T*>(c.y);
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  Lines<Work> v(kRows * kDepth), h(kRows * ranks);
  Lines<float> sum(kRows * ranks);
  Lines<uint32_t> keep(c.dropout ? kRows * kDepth : 0);
  for (int64_t number; tickets.take(&number);) {
    const auto [group, rows] = plan.tasks[number];
    if (group == Task::kNone) {
      copy_rows<T>(rows, c.residual, features, c.y);
      continue;
    }
    const Work* p = plan.p + group * packed_size(features, ranks);
    const Work* q = plan.q + group * packed_size(c.rank, q_stride);
    const float* down_bias = plan.down_bias + group * packed_size(1, ranks);
    const float* up_bias = plan.up_bias + group * packed_size(1, q_stride);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t k = 0; k < features; k += kDepth) {
      const int64_t depth = std::min(kDepth, features - k);
      K::stage(x + k, c.x.stride, rows, depth, v.data());
      K::project(v.data(), p + K::at(k, 0, ranks), rows.count, depth, ranks, sum.data());
    }
    for (int64_t m = 0; m < rows.count; ++m)
      for (int64_t j = 0; j < c.rank; j += kLanes)
        store_some(
            pre + rows[m] * c.rank + j, load(&sum[m * ranks + j]) + load(down_bias + j),
            std::min(kLanes, c.rank - j));
    activate_rows<T>(
        c, rows, [&](int64_t m, int64_t j, int64_t count, const Activated& act) PK_INLINE_LAMBDA {
          K::store_rounded(&h[m * ranks + j], act.value);
        });
    const int64_t step = c.dropout ? kDepth : features;  // the mask lies in pieces
    for (int64_t n = 0; n < features; n += step) {
      if (c.dropout) draw_keep(dropout, rows, features, n, keep.data());
      K::expand(
          h.data(), ranks, q + tile_at(n, c.rank),
          {.bias = up_bias + n,
           .keep = c.dropout ? keep.data() : nullptr,
           .keep_stride = kDepth,
           .factor = plan.factor ? plan.factor + n : nullptr,
           .before = residual ? residual + n : nullptr,
           .before_stride = c.residual.stride},
          rows, c.rank, std::min(step, features - n), y + n, features);
    }
  }
}

// Clones of one name would be one function even across files, anonymous namespace or not.
#define PK_DRIVER(name, K)                                                                  \
  PK_CLONES void adapter_forward_##name(const ForwardPlan<K>& plan, Tickets& tickets) {     \
    forward_blocks<K>(plan, tickets);                                                       \
  }

PK_DRIVER(float, Portable<float>)
PK_DRIVER(bfloat16, Portable<bfloat16>)
#ifdef PK_NATIVE
PK_DRIVER(native, NativeBFloat16)
#endif

template <typename K>
void forward_as(const AdapterForward& c, void (*blocks)(const ForwardPlan<K>&, Tickets&)) {
  using T = typename K::Element;
  const int64_t ranks = round_up(c.rank, kLanes), q_stride = round_up(c.features, kDepth);
  const Grouping grouping(c);
  const auto& numbers = grouping.numbers;
  const auto p = packed_p<K>(c.down, 1, c.features, c.features, c.rank, ranks, numbers);
  const auto q = packed_q<K>(c.up, 1, c.rank, c.rank, c.features, q_stride, numbers);
  const auto down_bias = vectors_of<T>(c.down_bias, c.rank, ranks, numbers);
  const auto up_bias = vectors_of<T>(c.up_bias, c.features, q_stride, numbers);
  Buffer<float> factor;
  if (c.channels || c.scale * c.keep_scale != 1.0f) {
    factor = uninitialized<float>(q_stride);
    for (int64_t n = 0; n < q_stride; ++n)
      factor[n] = (c.channels && n < c.features ? c.channels[n] : c.scale) * c.keep_scale;
  }
  std::vector<Task> tasks;
  for (int64_t group = 0; group < grouping.count(); ++group)
    add_tasks(group, grouping.rows[group], K::kForwardRows, &tasks);
  add_rest(grouping, &tasks);
  const ForwardPlan<K> plan{&c, tasks.data(), ranks, q_stride, p.get(), q.get(), down_bias.get(),
                            up_bias.get(), factor.get()};
  share_out(static_cast<int64_t>(tasks.size()), [&](Tickets& tickets) { blocks(plan, tickets); });
}

}  // namespace

void adapter_forward(const AdapterForward& call) {
  if (is_small(call)) return adapter_forward_small(call);
  if (call.type == Type::kFloat32) return forward_as<Portable<float>>(call, adapter_forward_float);
#ifdef PK_NATIVE
  if (native_bfloat16()) return forward_as<NativeBFloat16>(call, adapter_forward_native);
#endif
  forward_as<Portable<bfloat16>>(call, adapter_forward_bfloat16);
}

}  // namespace pk
