// Backward, launches 2 and 3: dk and dv, of the sequence and of the prefix.
//
//   p = e^(s - lse)     dp = keep dout v^T / (1 - p_drop)     ds = p (dp - delta + dlse)
//   dk = scale Σ_rows ds^T q     dv = Σ_rows (keep p)^T dout / (1 - p_drop)
//
// Grid (tiles of 64 keys, samples, key heads; slices of the head size; splits). A block holds keys
// and streams the rows that see them. A prefix's rows are those of all samples that share it, split
// into parts whose float sums prefix_parts_kernel adds in index order: no atomics on numbers,
// nothing of the size of a prefix for each sample. delta, and in float the correction of p, come
// from launch 1.
#include "prefix_scores.h"

namespace pk {
namespace {

template <typename T>
constexpr int kKeyShared = device::carved_bytes(2 * kWide<T> * sizeof(int64_t)) +
                           device::carved_bytes(2 * kWide<T> * sizeof(int)) +
                           device::carved_bytes(4 * kWide<T> * sizeof(float)) +
                           device::carved_bytes(kHeld * kWide<T> / 4) +
                           device::carved_bytes(2 * kHeldElements<T> * sizeof(T)) +
                           device::carved_bytes(2 * kPanelStage<T> * sizeof(T));

// A block's columns: of more than 64 the two gradients would not fit the registers.
constexpr int kColumns = 64;

// What the kernel makes: of the sequence in T, of the prefix in any type, or as float parts.
struct KeyGradients {
  void *d_key, *d_value;
  Type key_type, value_type;
  float *key_parts, *value_parts;  // where there are several splits
  bool of_prefix;
};

// Whether a query of these rows may see a key of [n0, n0 + 64): intervals only move forward.
PK_DEVICE bool may_see(const PrefixCall& call, int row0, int rows, int n0) {
  const int queries = static_cast<int>(call.queries);
  const int first = row0 % queries, last = first + rows - 1;
  if (last >= queries) return true;  // rows of several heads
  return seen_keys(call, first).first < n0 + kHeld && seen_keys(call, last).last > n0;
}

template <typename T>
PK_DEVICE void store_gradient(
    Values<T, kColumns>& values, T* shared, void* out, Type type, float* parts, bool whole,
    int64_t row0, int64_t d, int count, int column0, float factor) {
  if (whole) {
    store_values(values, shared, static_cast<T*>(out) + row0 * d, d, count, column0, factor);
    return;
  }
  PK_UNROLL for (int panel = 0; panel < Values<T, kColumns>::kPanels; ++panel)
    values.panel[panel].visit([&](int row, int column, float& sum) {
      const int64_t at = column0 + panel * kWide<T> + column;
      if (row >= count || at >= d) return;
      if (parts)
        parts[(row0 + row) * d + at] = sum * factor;
      else
        store_as(out, type, (row0 + row) * d + at, sum * factor);
    });
}

template <typename T>
PK_KERNEL PK_LAUNCH_BOUNDS(kPrefixThreads, 1) void prefix_key_gradient_kernel(
    PrefixCall call, PrefixGradients gradients, KeyGradients out) {
  constexpr int W = kWide<T>;
  char* cursor = device::shared_memory();
  int64_t* offsets = device::carve<int64_t>(cursor, 2 * W);
  int* bounds = device::carve<int>(cursor, 2 * W);
  float* numbers = device::carve<float>(cursor, 4 * W);
  uint8_t* keep = device::carve<uint8_t>(cursor, W * kHeld / 4);
  T* kept_p = device::carve<T>(cursor, 2 * kHeldElements<T>);
  T* stages = device::carve<T>(cursor, 2 * kPanelStage<T>);
  T* ds = kept_p + kHeldElements<T>;
  float *lse = numbers, *delta = numbers + W, *factor = numbers + 2 * W, *d_lse = numbers + 3 * W;

  const bool of_prefix = out.of_prefix, gated = of_prefix && call.gate;
  const int64_t owners = of_prefix && call.shared ? 1 : call.batch;
  const int sharing = static_cast<int>(call.batch / owners), d = static_cast<int>(call.head_size);
  const int tiles = device::grid_x() / static_cast<int>(owners * call.kv_heads);
  const int pair = device::block_x() / tiles, n0 = device::block_x() % tiles * kHeld;
  const int column0 = device::block_y() * kColumns;
  const int64_t owner = pair / call.kv_heads, kv_head = pair % call.kv_heads;
  const KeyRange<T> range = key_range<T>(call, owner, kv_head, of_prefix);
  const int count = range.count - n0 < kHeld ? range.count - n0 : kHeld;
  const PanelLines<T> keys = range.keys(n0), values = range.values(n0);
  const float score_scale = call.scale * base_factor<T>();

  const int rows = key_head(call, 0, 0).rows, group = key_head(call, 0, 0).group;
  float unit = 1.0f;
  if (gated) {
    float strongest = 0.0f;
    for (int head = 0; head < group; ++head)
      strongest = fmaxf(strongest, fabsf(tanhf(call.gate[kv_head * group + head])));
    unit = power_of_two(strongest);
  }
  Values<T, kColumns> dk, dv;
  dk.clear();
  dv.clear();
  const int row_tiles = (rows + W - 1) / W, all = sharing * row_tiles;
  const int length = (all + device::grid_z() - 1) / device::grid_z();
  const int begin = device::block_z() * length, end = begin + length < all ? begin + length : all;
  PK_NO_UNROLL for (int tile = begin; tile < end; ++tile) {
    const KeyHead of = key_head(call, owner * sharing + tile / row_tiles, kv_head);
    const int row0 = tile % row_tiles * W, rows_here = rows - row0 < W ? rows - row0 : W;
    if (!of_prefix && !may_see(call, row0, rows_here, n0)) continue;
    if (device::thread_x() < W) {
      const int row = device::thread_x();
      const bool exists = row < rows_here;
      const int known = row0 + (exists ? row : 0);
      const int64_t at = of.first_row + known;
      const Interval seen = seen_keys(call, known % static_cast<int>(call.queries));
      offsets[row] = row_offset(call, of, call.query, known);
      offsets[W + row] = row_offset(call, of, gradients.d_out, known);
      bounds[row] = seen.first;
      bounds[W + row] = seen.last;
      lse[row] = exists ? lse_of<T>((gated ? call.prefix_lse : call.lse)[at]) : INFINITY;
      // Only float corrects p, and gradients of values alone need no delta.
      const float* correction = gated ? gradients.prefix_correction : gradients.correction;
      factor[row] = sizeof(T) == 4 ? correction[at] : 1.0f;
      if (gated)
        factor[row] *=
            tanhf(call.gate[kv_head * group + known / static_cast<int>(call.queries)]) / unit;
      delta[row] = out.d_key ? (gated ? gradients.prefix_delta : gradients.delta)[at] : 0.0f;
      d_lse[row] = gradients.d_lse && !gated ? gradients.d_lse[at] : 0.0f;
    }
    if (call.dropout.seed)
      draw_keep<W, kHeld>(
          keep, call, of.first_row + row0, rows_here, range.first_group + n0 / 4);
    device::sync_threads();
    const PanelLines<T> queries{
        static_cast<const T*>(call.query.data), offsets, 0, rows_here, d, call.query.aligned};
    const PanelLines<T> d_outs{
        static_cast<const T*>(gradients.d_out.data), offsets + W, 0, rows_here, d,
        gradients.d_out.aligned};
    ScorePanel<T> p;
    p.clear();
    add_scores(p, stages, keys, queries);
    p.visit([&](int key, int row, float& score) {
      const bool seen = range.sees(n0 + key, bounds[row], bounds[W + row]);
      const float power = device::multiply_add(score, score_scale, -lse[row]);
      score = seen ? exponential<T>(power) * factor[row] : 0.0f;
    });
    if (out.d_value) {
      p.visit([&](int key, int row, float& one) {
        const bool drops = call.dropout.seed && !is_kept<kHeld>(keep, row, key);
        kept_p[key * padded<T>(W) + row] = from_float<T>(drops ? 0.0f : one);
      });
      add_values(dv, stages, kept_p, d_outs, column0);
    }
    if (out.d_key) {
      ScorePanel<T> dp;
      dp.clear();
      add_scores(dp, stages, values, d_outs);
      p.visit_with(dp, [&](int slot, int row, float& one, float& other) {
        const int key = ScorePanel<T>::row_of(slot);
        if (call.dropout.seed)
          other = is_kept<kHeld>(keep, row, key) ? other * call.inverse_keep : 0.0f;
        const float change = other - delta[row] + d_lse[row];
        ds[key * padded<T>(W) + row] = from_float<T>(change * one);
      });
      add_values(dk, stages, ds, queries, column0);
    }
  }
  const int64_t row0 = static_cast<int64_t>(pair) * range.count + n0;
  const int64_t size = owners * call.kv_heads * range.count * d;
  const auto part = [&](float* parts) {
    return device::grid_z() > 1 ? parts + device::block_z() * size : nullptr;
  };
  if (out.d_key)
    store_gradient(
        dk, ds, out.d_key, out.key_type, part(out.key_parts), !of_prefix, row0, d, count, column0,
        call.scale * unit);
  if (out.d_value)
    store_gradient(
        dv, kept_p, out.d_value, out.value_type, part(out.value_parts), !of_prefix, row0, d, count,
        column0, call.inverse_keep * unit);
}

// Grid (blocks of elements,): add the parts of each element in index order and round once.
PK_KERNEL PK_LAUNCH_BOUNDS(kPrefixThreads, 1) void prefix_parts_kernel(
    const float* parts, int64_t size, int64_t splits, void* out, Type type) {
  const int64_t i = static_cast<int64_t>(device::block_x()) * kPrefixThreads + device::thread_x();
  if (i >= size) return;
  float total = 0.0f;
  for (int64_t split = 0; split < splits; ++split) total += parts[split * size + i];
  store_as(out, type, i, total);
}

template <typename T>
int launch_key_gradient(
    const PrefixCall& call, const PrefixGradients& gradients, bool of_prefix,
    device::Stream stream) {
  const int64_t owners = of_prefix && call.shared ? 1 : call.batch;
  const int64_t keys = of_prefix ? call.prefix : call.keys;
  const int64_t size = owners * call.kv_heads * keys * call.head_size;
  const int64_t splits = of_prefix ? gradients.splits : 1;
  KeyGradients out{
      gradients.d_key, gradients.d_value, call.type, call.type, nullptr, nullptr, false};
  if (of_prefix)
    out = {
        gradients.d_prefix_key, gradients.d_prefix_value, gradients.d_prefix_key_type,
        gradients.d_prefix_value_type, gradients.parts, gradients.parts + splits * size, true};
  int status = device::launch(
      "prefix_key_gradient_kernel", prefix_key_gradient_kernel<T>,
      {owners * call.kv_heads * ((keys + kHeld - 1) / kHeld),
       (call.head_size + kColumns - 1) / kColumns, splits},
      kPrefixThreads, kKeyShared<T>, stream, call, gradients, out);
  const auto add = [&](const float* parts, void* gradient, Type type) {
    if (splits > 1 && gradient && !status)
      status = device::launch(
          "prefix_parts_kernel", prefix_parts_kernel,
          {(size + kPrefixThreads - 1) / kPrefixThreads}, kPrefixThreads, 0, stream, parts, size,
          splits, gradient, type);
  };
  add(out.key_parts, out.d_key, out.key_type);
  add(out.value_parts, out.d_value, out.value_type);
  return status;
}

}  // namespace

int prefix_key_gradient(
    const PrefixCall& call, const PrefixGradients& gradients, bool of_prefix,
    device::Stream stream) {
  switch (call.type) {
    case Type::kFloat16: return launch_key_gradient<Half>(call, gradients, of_prefix, stream);
    case Type::kBFloat16:
      return launch_key_gradient<BFloat16>(call, gradients, of_prefix, stream);
    default: return launch_key_gradient<float>(call, gradients, of_prefix, stream);
  }
}

}  // namespace pk
