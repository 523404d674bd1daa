// The low-rank part of LoRA on the CPU: one pass over each activation per direction. The caller has made y = x W^T and dx = dy W by the GEMM library.
// Forward, per block of rows: s = factor * (mask * x) A^T, then y += bias + s B^T.
// Backward, per block of rows: dy is read once for ds, dB and dbias, x once for dA, then
// dx += mask * (ds A). The mask is drawn again, never stored.
//
// Gradients of the factors are summed per chunk of rows and the chunks in order: a function of the
// shapes alone, so results do not depend on the number of threads.
#include "lora.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "lora_small.h"
#include "lowrank.h"
#include "lowrank_bf16.h"
#include "pack.h"
#include "parts.h"

namespace pk {
namespace {

int64_t blocks_of(int64_t rows, int64_t size) { return (rows + size - 1) / size; }

template <typename K>
struct ForwardPlan {
  const LoRAForward* call;
  int64_t ranks;
  const typename K::Work *p, *q;
  const float* bias;
};

template <typename K>
PK_INLINE void forward_blocks(const ForwardPlan<K>& plan, int64_t begin, int64_t end) {
  using T = typename K::Element;
  using Work = typename K::Work;
  const LoRAForward& c = *plan.call;
  const int64_t ranks = plan.ranks;
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  Lines<Work> v(K::kForwardRows * kDepth), left(K::kForwardRows * ranks);
  Lines<float> s(K::kForwardRows * ranks);
  Lines<uint32_t> keep(c.dropout ? K::kForwardRows * kDepth : 0);
  const Rows all{0, c.tokens, nullptr};
  const T* x = static_cast<const T*>(c.x.data);
  T* y = static_cast<T*>(c.y);
  for (int64_t block = begin; block < end; ++block) {
    const Rows rows = all.part(block * K::kForwardRows, K::kForwardRows);
    std::fill(s.begin(), s.end(), 0.0f);
    for (int64_t k = 0; k < c.in_features; k += kDepth) {
      const int64_t depth = std::min(kDepth, c.in_features - k);
      K::stage(x + k, c.x.stride, rows, depth, v.data());
      if (c.dropout) {
        draw_keep(dropout, rows, c.in_features, k, keep.data());
        K::apply_mask(keep.data(), rows.count, v.data());
      }
      K::project(v.data(), plan.p + K::at(k, 0, ranks), rows.count, depth, ranks, s.data());
    }
    T* out = static_cast<T*>(c.s) + rows.first * c.rank;
    for (int64_t m = 0; m < rows.count; ++m)
      for (int64_t j = 0; j < c.rank; j += kLanes) {
        const int64_t count = std::min(kLanes, c.rank - j);
        const vf values = load(&s[m * ranks + j]) * c.factor;
        store_some(out + m * c.rank + j, values, count);
        // Zero beyond the rank, where an infinity of x has met P's zeros.
        store_some(&left[m * ranks + j], rounded<T>(values), count);
      }
    K::expand(
        left.data(), ranks, plan.q,
        {.bias = plan.bias, .before = y, .before_stride = c.out_features}, rows, c.rank,
        c.out_features, y, c.out_features);
  }
}

template <typename K>
struct BackwardPlan {
  const LoRABackward* call;
  int64_t ranks, chunks, blocks_per_chunk, da_rows, db_rows;
  const typename K::Work *p, *q;
  float *da, *db, *dbias;  // one part per chunk
};

template <typename K>
PK_INLINE void backward_chunk(const BackwardPlan<K>& plan, int64_t chunk) {
  using T = typename K::Element;
  using Work = typename K::Work;
  constexpr int64_t kRows = K::kRows;
  const LoRABackward& c = *plan.call;
  const Dropout dropout{c.dropout, c.seed, c.threshold};
  const int64_t ranks = plan.ranks;
  const bool need_ds = c.dx || c.da.data;
  Lines<Work> v(kRows * kDepth), s(kRows * ranks), ds(kRows * ranks), ds_left(kRows * ranks);
  Lines<float> sum(kRows * ranks);
  Lines<uint32_t> keep(c.dropout ? kRows * kDepth : 0);
  float* da = plan.da + chunk * plan.da_rows * ranks;
  float* db = plan.db + chunk * plan.db_rows * ranks;
  float* dbias = plan.dbias + chunk * c.out_features;
  if (c.dbias.data) std::fill_n(dbias, c.out_features, 0.0f);
  const int64_t last = std::min(blocks_of(c.tokens, kRows), (chunk + 1) * plan.blocks_per_chunk);
  const Rows all{0, c.tokens, nullptr};
  const T *dy = static_cast<const T*>(c.dy.data), *x = static_cast<const T*>(c.x.data);
  for (int64_t block = chunk * plan.blocks_per_chunk; block < last; ++block) {
    const bool fresh = block == chunk * plan.blocks_per_chunk;
    const Rows rows = all.part(block * kRows, kRows);
    std::fill(s.begin(), s.end(), Work{});
    std::fill(ds.begin(), ds.end(), Work{});
    std::fill(sum.begin(), sum.end(), 0.0f);
    const T* saved = static_cast<const T*>(c.s) + rows.first * c.rank;
    for (int64_t m = 0; m < rows.count; ++m)
      for (int64_t j = 0; j < c.rank; ++j)
        s[K::at(m, j, ranks)] = K::work(saved[m * c.rank + j]);

    for (int64_t n = 0; n < c.out_features; n += kDepth) {
      const int64_t depth = std::min(kDepth, c.out_features - n);
      K::stage(dy + n, c.dy.stride, rows, depth, v.data());
      if (need_ds) K::project(v.data(), plan.p + K::at(n, 0, ranks), rows.count, depth, ranks, sum.data());
      if (c.db.data) K::gradient(v.data(), s.data(), rows.count, depth, ranks, fresh, db + n * ranks);
      if (c.dbias.data) add_column_sums(v.data(), rows.count, depth, dbias + n);
    }
    if (!need_ds) continue;
    for (int64_t m = 0; m < rows.count; ++m)
      for (int64_t j = 0; j < c.rank; j += kLanes) {
        const int64_t count = std::min(kLanes, c.rank - j);
        Work* values = &ds_left[m * ranks + j];
        store_some(values, rounded<T>(load(&sum[m * ranks + j]) * c.factor), count);
        for (int64_t i = 0; i < count; ++i) ds[K::at(m, j + i, ranks)] = values[i];
      }

    for (int64_t k = 0; k < c.in_features; k += kDepth) {
      const int64_t depth = std::min(kDepth, c.in_features - k);
      if (c.dropout) draw_keep(dropout, rows, c.in_features, k, keep.data());
      if (c.da.data) {
        K::stage(x + k, c.x.stride, rows, depth, v.data());
        if (c.dropout) K::apply_mask(keep.data(), rows.count, v.data());
        K::gradient(v.data(), ds.data(), rows.count, depth, ranks, fresh, da + k * ranks);
      }
      if (!c.dx) continue;
      T* dx = static_cast<T*>(c.dx) + k;
      K::expand(
          ds_left.data(), ranks, plan.q + tile_at(k, c.rank),
          {.keep = c.dropout ? keep.data() : nullptr,
           .keep_stride = kDepth,
           .before = dx,
           .before_stride = c.in_features},
          rows, c.rank, depth, dx, c.in_features);
    }
  }
}

// Clones of one name would be one function even across files, anonymous namespace or not.
#define PK_DRIVERS(name, K)                                                                    \
  PK_CLONES void lora_forward_##name(const ForwardPlan<K>& plan, int64_t begin, int64_t end) {      \
    forward_blocks<K>(plan, begin, end);                                                       \
  }                                                                                            \
  PK_CLONES void lora_backward_##name(const BackwardPlan<K>& plan, int64_t begin, int64_t end) {    \
    for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<K>(plan, chunk);          \
  }

PK_DRIVERS(float, Portable<float>)
PK_DRIVERS(bfloat16, Portable<bfloat16>)
#ifdef PK_NATIVE
PK_DRIVERS(native, NativeBFloat16)
#endif

template <typename K>
void forward_as(const LoRAForward& call, void (*blocks)(const ForwardPlan<K>&, int64_t, int64_t)) {
  const int64_t ranks = round_up(call.rank, kLanes);
  const int64_t q_stride = round_up(call.out_features, kColumns);
  const auto p = packed_p<K>(call.lora_a, 1, call.in_features, call.in_features, call.rank, ranks);
  const auto q = packed_q<K>(call.lora_b, 1, call.rank, call.rank, call.out_features, q_stride);
  Buffer<float> bias;
  if (call.bias)
    bias = packed_p<Portable<typename K::Element>>(call.bias, 0, 1, 1, call.out_features, q_stride);
  const ForwardPlan<K> plan{&call, ranks, p.get(), q.get(), bias.get()};
  const int64_t count = blocks_of(call.tokens, K::kForwardRows);
  if (count == 1) {
    blocks(plan, 0, 1);
  } else {
    torch::stable::parallel_for(
        0, count, 1, [&](int64_t begin, int64_t end) { blocks(plan, begin, end); });
  }
}

template <typename K>
void backward_as(const LoRABackward& call, void (*chunks)(const BackwardPlan<K>&, int64_t, int64_t)) {
  const int64_t ranks = round_up(call.rank, kLanes);
  const int64_t q_stride = round_up(call.in_features, kDepth);
  const auto p = packed_p<K>(call.lora_b, call.rank, 1, call.out_features, call.rank, ranks);
  Buffer<typename K::Work> q;
  if (call.dx) q = packed_q<K>(call.lora_a, call.in_features, 1, call.rank, call.in_features, q_stride);

  BackwardPlan<K> plan{&call, ranks, 0, 0, 0, 0, p.get(), q.get(), nullptr, nullptr, nullptr};
  plan.da_rows = call.da.data ? round_up(call.in_features, kGradientRows) : 0;
  plan.db_rows = call.db.data ? round_up(call.out_features, kGradientRows) : 0;
  const int64_t part = (plan.da_rows + plan.db_rows) * ranks * static_cast<int64_t>(sizeof(float));
  const Chunks split = chunks_of(call.tokens, call.tokens, K::kRows, part);
  plan.chunks = split.count;
  plan.blocks_per_chunk = split.blocks_per_chunk;
  const auto da = uninitialized<float>(plan.chunks * plan.da_rows * ranks);
  const auto db = uninitialized<float>(plan.chunks * plan.db_rows * ranks);
  const auto dbias = uninitialized<float>(call.dbias.data ? plan.chunks * call.out_features : 0);
  plan.da = da.get();
  plan.db = db.get();
  plan.dbias = dbias.get();
  if (plan.chunks == 1) {
    chunks(plan, 0, 1);
  } else {
    torch::stable::parallel_for(
        0, plan.chunks, 1, [&](int64_t begin, int64_t end) { chunks(plan, begin, end); });
  }

  sum_parts(plan.da, plan.chunks, plan.da_rows * ranks);
  sum_parts(plan.db, plan.chunks, plan.db_rows * ranks);
  sum_parts(plan.dbias, plan.chunks, call.dbias.data ? call.out_features : 0);
  // da is the transpose of what was summed.
  write_gradient(plan.da, 1, ranks, call.rank, call.in_features, call.da);
  write_gradient(plan.db, ranks, 1, call.out_features, call.rank, call.db);
  write_gradient(plan.dbias, 0, 1, 1, call.out_features, call.dbias);
}

}  // namespace

void lora_forward(const LoRAForward& call) {
  if (call.weight) return lora_forward_small(call);
  if (call.type == Type::kFloat32) return forward_as<Portable<float>>(call, lora_forward_float);
#ifdef PK_NATIVE
  if (native_bfloat16()) return forward_as<NativeBFloat16>(call, lora_forward_native);
#endif
  forward_as<Portable<bfloat16>>(call, lora_forward_bfloat16);
}

void lora_backward(const LoRABackward& call) {
  // Without rows the gradients of the factors are zero.
  if (call.weight || call.tokens == 0) return lora_backward_small(call);
  if (call.type == Type::kFloat32) return backward_as<Portable<float>>(call, lora_backward_float);
#ifdef PK_NATIVE
  if (native_bfloat16()) return backward_as<NativeBFloat16>(call, lora_backward_native);
#endif
  backward_as<Portable<bfloat16>>(call, lora_backward_bfloat16);
}

}  // namespace pk
