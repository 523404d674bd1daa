// Backward, launch 1: dq, and delta for the launches after it.
//
//   p = e^(s - lse)     dp = keep dout v^T / (1 - p_drop)     ds = p (dp - delta + dlse)
//   delta = Σ_keys p dp = Σ_d dout out     dq = scale Σ_keys ds k
//
// Grid as forward. In float the roundings of lse and out would be the largest errors of p and delta:
// the keys are visited once more before, for delta = Σ p dp and for Σ p, which should have been 1 and
// by which every p is divided (the correction). Gated, with t = tanh(gate) and delta_p = Σ_prefix
// p dp: ds of the prefix is t p (dp - delta_p), and delta of the sequence is less by t delta_p.
#include <type_traits>

#include "prefix_scores.h"

namespace pk {
namespace {

template <typename T>
constexpr int kQueryShared = device::carved_bytes(2 * kHeld * sizeof(int64_t)) +
                             device::carved_bytes(2 * kHeld * sizeof(int)) +
                             device::carved_bytes(kHeld * sizeof(float)) +
                             device::carved_bytes(kHeld * kWide<T> / 4) +
                             device::carved_bytes(kHeldElements<T> * sizeof(T)) +
                             device::carved_bytes(2 * kPanelStage<T> * sizeof(T));

template <typename T, int kColumns>
PK_KERNEL PK_LAUNCH_BOUNDS(kPrefixThreads, 1) void prefix_query_gradient_kernel(
    PrefixCall call, PrefixGradients gradients) {
  constexpr bool kExact = std::is_same_v<T, float>;
  constexpr int W = kWide<T>, kSlots = ScorePanel<T>::kSlots;
  char* cursor = device::shared_memory();
  int64_t* offsets = device::carve<int64_t>(cursor, 2 * kHeld);
  int* bounds = device::carve<int>(cursor, 2 * kHeld);
  float* sums = device::carve<float>(cursor, kHeld);
  uint8_t* keep = device::carve<uint8_t>(cursor, kHeld * W / 4);
  T* ds = device::carve<T>(cursor, kHeldElements<T>);
  T* stages = device::carve<T>(cursor, 2 * kPanelStage<T>);

  const int pairs = static_cast<int>(call.batch * call.kv_heads), tiles = device::grid_x() / pairs;
  const int pair = device::block_x() / tiles, d = static_cast<int>(call.head_size);
  const int row0 = (tiles - 1 - device::block_x() % tiles) * kHeld;
  const int column0 = device::block_y() * kColumns;
  const KeyHead of = key_head(call, pair / call.kv_heads, pair % call.kv_heads);
  const int count = of.rows - row0 < kHeld ? of.rows - row0 : kHeld;
  const int64_t first_row = of.first_row + row0;
  if (device::thread_x() < kHeld) {
    const int row = device::thread_x();
    const bool exists = row < count;
    const Interval seen =
        exists ? seen_keys(call, (row0 + row) % static_cast<int>(call.queries)) : Interval{0, 0};
    offsets[row] = exists ? row_offset(call, of, call.query, row0 + row) : 0;
    offsets[kHeld + row] = exists ? row_offset(call, of, gradients.d_out, row0 + row) : 0;
    bounds[row] = seen.first;
    bounds[kHeld + row] = seen.last;
  }
  device::sync_threads();
  int start = static_cast<int>(call.keys), stop = 0;
  for (int row = 0; row < count; ++row) {
    start = bounds[row] < start ? bounds[row] : start;
    stop = bounds[kHeld + row] > stop ? bounds[kHeld + row] : stop;
  }
  const T* d_out_data = static_cast<const T*>(gradients.d_out.data);
  const PanelLines<T> queries{
      static_cast<const T*>(call.query.data), offsets, 0, count, d, call.query.aligned};
  const PanelLines<T> d_outs{d_out_data, offsets + kHeld, 0, count, d, gradients.d_out.aligned};

  // Of the softmax over the sequence, or over both, and of the gated prefix.
  float lse[kSlots], delta[kSlots], factor[kSlots], d_lse[kSlots];
  float prefix_lse[kSlots], prefix_delta[kSlots], prefix_factor[kSlots];
  if constexpr (!kExact) {
    const T* out = static_cast<const T*>(call.out) + first_row * d;
    PK_NO_UNROLL for (int row = device::warp(); row < count; row += kPrefixThreads / 32) {
      float sum = 0.0f;
      for (int i = device::lane(); i < d; i += 32)
        sum += to_float(d_out_data[offsets[kHeld + row] + i]) *
               to_float(out[static_cast<int64_t>(row) * d + i]);
      for (int mask = 16; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
      if (device::lane() == 0) sums[row] = sum;
    }
    device::sync_threads();
  }
  PK_UNROLL for (int i = 0; i < kSlots; ++i) {
    const int row = ScorePanel<T>::row_of(i);
    const bool exists = row < count;
    lse[i] = exists ? lse_of<T>(call.lse[first_row + row]) : INFINITY;
    prefix_lse[i] =
        !call.gate ? lse[i] : exists ? lse_of<T>(call.prefix_lse[first_row + row]) : INFINITY;
    d_lse[i] = exists && gradients.d_lse ? gradients.d_lse[first_row + row] : 0.0f;
    delta[i] = kExact || !exists ? 0.0f : sums[row];
    prefix_delta[i] = factor[i] = prefix_factor[i] = 0.0f;
  }

  const float score_scale = call.scale * base_factor<T>();
  Values<T, kColumns> dq;
  dq.clear();
  // First the sums, then the gradient; each over the prefix, then over the sequence.
  PK_NO_UNROLL for (int step = 0; step < 4; ++step) {
    const bool sums_only = step < 2, of_prefix = step % 2 == 0;
    if (sums_only && !kExact && !(call.gate && of_prefix)) continue;
    if (step == 2) {
      const auto add = [](float a, float b) { return a + b; };
      if (kExact) over_row<T>(delta, add);
      over_row<T>(prefix_delta, add);
      over_row<T>(factor, add);
      over_row<T>(prefix_factor, add);
      PK_UNROLL for (int i = 0; i < kSlots; ++i) {
        const int row = ScorePanel<T>::row_of(i), known = row < count ? row : 0;
        factor[i] = kExact && factor[i] > 0.0f ? 1.0f / factor[i] : 1.0f;
        prefix_factor[i] = kExact && prefix_factor[i] > 0.0f ? 1.0f / prefix_factor[i] : 1.0f;
        const int64_t at = first_row + known;
        const bool stores =
            row < count && device::block_y() == 0 && device::lane() % ScorePanel<T>::kRowLanes == 0;
        if (kExact) delta[i] *= factor[i];
        if (call.gate) {
          prefix_delta[i] *= prefix_factor[i];
          if (stores) {
            gradients.prefix_delta[at] = prefix_delta[i];
            gradients.prefix_correction[at] = prefix_factor[i];
          }
          const int head = (row0 + known) / static_cast<int>(call.queries);
          const float strength = tanhf(call.gate[of.head * of.group + head]);
          if (!kExact) delta[i] -= strength * prefix_delta[i];
          prefix_factor[i] *= strength;
        } else {
          prefix_delta[i] = delta[i];
          prefix_factor[i] = factor[i];
        }
        if (stores) {
          gradients.delta[at] = delta[i];
          gradients.correction[at] = factor[i];
        }
      }
      if (!gradients.d_query) break;
    }
    const bool apart = of_prefix && call.gate;
    const KeyRange<T> range = key_range<T>(call, of.batch, of.head, of_prefix);
    const int begin = of_prefix ? 0 : start / W * W, end = of_prefix ? range.count : stop;
    PK_NO_UNROLL for (int n0 = begin; n0 < end; n0 += W) {
      ScorePanel<T> p, dp;
      p.clear();
      add_scores(p, stages, queries, range.keys(n0));
      if (call.dropout.seed)
        draw_keep<kHeld, W>(keep, call, first_row, count, range.first_group + n0 / 4);
      dp.clear();
      add_scores(dp, stages, d_outs, range.values(n0));
      p.visit_slots([&](int slot, int column, float& score) {
        const int row = ScorePanel<T>::row_of(slot);
        const bool seen = range.sees(n0 + column, bounds[row], bounds[kHeld + row]);
        const float normaliser = of_prefix ? prefix_lse[slot] : lse[slot];
        score = seen ? exponential<T>(score * score_scale - normaliser) : 0.0f;
      });
      if (call.dropout.seed)
        dp.visit_slots([&](int slot, int column, float& sum) {
          const bool kept = is_kept<W>(keep, ScorePanel<T>::row_of(slot), column);
          sum = kept ? sum * call.inverse_keep : 0.0f;
        });
      if (sums_only) {
        p.visit_with(dp, [&](int slot, int, float& one, float& other) {
          if (apart) {
            prefix_delta[slot] += one * other;
            prefix_factor[slot] += one;
          } else {
            delta[slot] += one * other;
            factor[slot] += one;
          }
        });
        continue;
      }
      p.visit_with(dp, [&](int slot, int column, float& one, float& other) {
        const float change = apart ? other - prefix_delta[slot]
                                   : other - delta[slot] + d_lse[slot];
        const float value = change * one * (of_prefix ? prefix_factor[slot] : factor[slot]);
        ds[ScorePanel<T>::row_of(slot) * padded<T>(W) + column] = from_float<T>(value);
      });
      add_values(dq, stages, ds, range.keys(n0), column0);
    }
  }
  if (gradients.d_query)
    store_values(
        dq, ds, static_cast<T*>(gradients.d_query) + first_row * d, d, count, column0, call.scale);
}

template <typename T, int kColumns>
int launch_query_gradient(
    const PrefixCall& call, const PrefixGradients& gradients, device::Stream stream) {
  const int64_t rows = call.heads / call.kv_heads * call.queries;
  const int64_t slices = gradients.d_query ? (call.head_size + kColumns - 1) / kColumns : 1;
  return device::launch(
      "prefix_query_gradient_kernel", prefix_query_gradient_kernel<T, kColumns>,
      {call.batch * call.kv_heads * ((rows + kHeld - 1) / kHeld), slices}, kPrefixThreads,
      kQueryShared<T>, stream, call, gradients);
}

template <typename T>
int launch_query_gradient(
    const PrefixCall& call, const PrefixGradients& gradients, device::Stream stream) {
  return call.head_size <= 64 ? launch_query_gradient<T, 64>(call, gradients, stream)
                              : launch_query_gradient<T, 128>(call, gradients, stream);
}

}  // namespace

int prefix_query_gradient(
    const PrefixCall& call, const PrefixGradients& gradients, device::Stream stream) {
  switch (call.type) {
    case Type::kFloat16: return launch_query_gradient<Half>(call, gradients, stream);
    case Type::kBFloat16: return launch_query_gradient<BFloat16>(call, gradients, stream);
    default: return launch_query_gradient<float>(call, gradients, stream);
  }
}

}  // namespace pk
