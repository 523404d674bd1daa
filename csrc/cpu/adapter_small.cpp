#include "adapter_small.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "aligned.h"
#include "dots.h"
#include "lowrank_bf16.h"

namespace pk {
namespace {

constexpr int64_t kMostRows = 16, kMostNative = 32;  // of more, packing pays
constexpr int64_t kTaskProducts = 1 << 15;  // that a thread makes at least

template <typename K>
struct SmallPlan {
  const AdapterForward* call;
  const typename K::Work* x;  // [tokens, x_stride]
  int64_t x_stride, ranks;
  float* sum;            // [tokens, ranks]
  typename K::Work* h;   // [tokens, ranks], zero beyond the rank
};

// run(m, rows) for four, two or one rows from row m on.
template <typename Run>
PK_INLINE void in_groups(int64_t tokens, const Run& run) {
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4) run(m, std::integral_constant<int, 4>{});
  for (; m + 2 <= tokens; m += 2) run(m, std::integral_constant<int, 2>{});
  for (; m < tokens; ++m) run(m, std::integral_constant<int, 1>{});
}

// sum = x down^T, ranks [kLanes begin, kLanes end).
template <typename K>
PK_INLINE void contract(const SmallPlan<K>& plan, int64_t begin, int64_t end) {
  const AdapterForward& c = *plan.call;
  const auto* down = static_cast<const typename K::Element*>(c.down);
  for (int64_t j = begin * kLanes; j < std::min(c.rank, end * kLanes); j += kLanes)
    in_groups(c.tokens, [&](int64_t m, auto rows) PK_INLINE_LAMBDA {
      float line[rows * kLanes] = {};
      dots<rows>(
          plan.x + m * plan.x_stride, plan.x_stride, down + j * c.features, c.features, c.rank - j,
          line);
      for (int i = 0; i < rows; ++i)
        store(plan.sum + (m + i) * plan.ranks + j, load(line + i * kLanes));
    });
}

// pre and h from the sums.
template <typename K>
PK_INLINE void activate_sums(const SmallPlan<K>& plan) {
  using T = typename K::Element;
  const AdapterForward& c = *plan.call;
  const T* bias = static_cast<const T*>(c.down_bias);
  with_activation(c.activation, [&](auto activation) PK_INLINE_LAMBDA {
    for (int64_t m = 0; m < c.tokens; ++m)
      for (int64_t j = 0; j < c.rank; j += kLanes) {
        const int64_t count = std::min(kLanes, c.rank - j);
        T* pre = static_cast<T*>(c.pre) + m * c.rank + j;
        vf sum = load(plan.sum + m * plan.ranks + j);
        if (bias) sum += load_some(bias + j, count);
        store_some(pre, sum, count);
        const vf value = activate(activation, load_some(pre, count)).value;
        store_some(plan.h + m * plan.ranks + j, rounded<T>(value), count);
      }
  });
}

// y, columns [kLanes begin, kLanes end).
template <typename K>
PK_INLINE void expand(const SmallPlan<K>& plan, int64_t begin, int64_t end) {
  using T = typename K::Element;
  const AdapterForward& c = *plan.call;
  const T *up = static_cast<const T*>(c.up), *bias = static_cast<const T*>(c.up_bias);
  const T* residual = static_cast<const T*>(c.residual.data);
  for (int64_t n = begin * kLanes; n < std::min(c.features, end * kLanes); n += kLanes) {
    const int64_t count = std::min(kLanes, c.features - n);
    in_groups(c.tokens, [&](int64_t m, auto rows) PK_INLINE_LAMBDA {
      float line[rows * kLanes] = {};
      dots<rows>(plan.h + m * plan.ranks, plan.ranks, up + n * c.rank, c.rank, c.features - n, line);
      for (int i = 0; i < rows; ++i) {
        vf y = load(line + i * kLanes);
        if (bias) y += load_some(bias + n, count);
        y *= c.channels ? load_some(c.channels + n, count) : vf{} + c.scale;
        if (residual) y += load_some(residual + (m + i) * c.residual.stride + n, count);
        store_some(static_cast<T*>(c.y) + (m + i) * c.features + n, y, count);
      }
    });
  }
}

// Rows of x as float32, zeros up to `stride`.
template <typename K>
PK_INLINE void widen(const AdapterForward& c, int64_t stride, float* to) {
  using T = typename K::Element;
  for (int64_t m = 0; m < c.tokens; ++m)
    for (int64_t k = 0; k < c.features; k += kLanes)
      store(
          to + m * stride + k, load_some(
                                   static_cast<const T*>(c.x.data) + m * c.x.stride + k,
                                   std::min(kLanes, c.features - k)));
}

enum class Step { kContract, kActivate, kExpand };

template <typename K>
PK_INLINE void make(Step step, const SmallPlan<K>& plan, int64_t begin, int64_t end) {
  switch (step) {
    case Step::kContract: return contract<K>(plan, begin, end);
    case Step::kActivate: return activate_sums<K>(plan);
    case Step::kExpand: return expand<K>(plan, begin, end);
  }
}

// Clones of one name would be one function even across files, anonymous namespace or not.
#define PK_DRIVER(name, K)                                                                       \
  PK_CLONES void adapter_small_##name(                                                           \
      Step step, const SmallPlan<K>& plan, int64_t begin, int64_t end) {                         \
    make<K>(step, plan, begin, end);                                                             \
  }

PK_DRIVER(float, Portable<float>)
PK_DRIVER(bfloat16, Portable<bfloat16>)
#ifdef PK_NATIVE
PK_DRIVER(native, NativeBFloat16)
#endif

PK_CLONES void widen_floats(const AdapterForward& call, int64_t stride, float* to) {
  widen<Portable<float>>(call, stride, to);
}
PK_CLONES void widen_bfloat16(const AdapterForward& call, int64_t stride, float* to) {
  widen<Portable<bfloat16>>(call, stride, to);
}

// work(begin, end) over chunks of so many products each.
template <typename Work>
void share(int64_t chunks, int64_t products, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kTaskProducts / std::max<int64_t>(1, products));
  if (chunks <= grain) return work(0, chunks);
  torch::stable::parallel_for(0, chunks, grain, work);
}

template <typename K>
void forward_as(
    const AdapterForward& c, const typename K::Work* x, int64_t x_stride,
    void (*make)(Step, const SmallPlan<K>&, int64_t, int64_t)) {
  using Work = typename K::Work;
  const int64_t ranks = round_up(c.rank, kLanes), all = c.tokens * ranks;
  const auto sum = uninitialized<float>(all);
  const auto h = uninitialized<Work>(all);
  std::fill_n(h.get(), all, Work{});
  const SmallPlan<K> plan{&c, x, x_stride, ranks, sum.get(), h.get()};
  share(ranks / kLanes, c.tokens * kLanes * c.features, [&](int64_t begin, int64_t end) {
    make(Step::kContract, plan, begin, end);
  });
  make(Step::kActivate, plan, 0, 0);
  share(
      (c.features + kLanes - 1) / kLanes, c.tokens * kLanes * c.rank,
      [&](int64_t begin, int64_t end) { make(Step::kExpand, plan, begin, end); });
}

}  // namespace

bool is_small(const AdapterForward& call) {
  const bool native = call.type == Type::kBFloat16 && native_bfloat16();
  return call.tokens <= (native ? kMostNative : kMostRows) && !call.dropout && !call.index;
}

void adapter_forward_small(const AdapterForward& c) {
  const bool wide = c.type == Type::kFloat32;
#ifdef PK_NATIVE
  if (!wide && native_bfloat16())
    return forward_as<NativeBFloat16>(
        c, static_cast<const bfloat16*>(c.x.data), c.x.stride, adapter_small_native);
#endif
  const int64_t width = round_up(c.features, kLanes);
  if (wide && width == c.features)
    return forward_as<Portable<float>>(
        c, static_cast<const float*>(c.x.data), c.x.stride, adapter_small_float);
  const auto x = uninitialized<float>(c.tokens * width);
  if (wide) {
    widen_floats(c, width, x.get());
    return forward_as<Portable<float>>(c, x.get(), width, adapter_small_float);
  }
  widen_bfloat16(c, width, x.get());
  forward_as<Portable<bfloat16>>(c, x.get(), width, adapter_small_bfloat16);
}

}  // namespace pk
