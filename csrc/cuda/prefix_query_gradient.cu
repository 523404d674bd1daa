// Backward, launch 1: dq, and delta for the launches after it.
//
//   p = e^(s - lse)     dp = keep dout v^T / (1 - p_drop)     ds = p (dp - delta + dlse)
//   delta = Σ_keys p dp = Σ_d dout out     dq = scale Σ_keys ds k
//
// Grid as forward. In float the roundings of lse and out would be the largest errors of p and
// delta: the keys are visited once more before, for delta = Σ p dp and for Σ p, which should have
// been 1 and by which every p is divided (the correction). Gated, with t = tanh(gate) and
// delta_p = Σ_prefix p dp: ds of the prefix is t p (dp - delta_p), and delta of the sequence is
// less by t delta_p.
#include <type_traits>

#include "prefix_scores.h"

namespace pk {
namespace {

template <typename T>
constexpr int kQueryShared = device::carved_bytes(2 * kHeld * sizeof(int64_t)) +
                             device::carved_bytes(2 * kHeld * sizeof(int)) +
                             device::carved_bytes(8 * kHeld * sizeof(float)) +
                             device::carved_bytes(kHeld * kWide<T> / 4) +
                             device::carved_bytes(kWide<T>) +
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
  float* numbers = device::carve<float>(cursor, 8 * kHeld);
  uint8_t* keep = device::carve<uint8_t>(cursor, kHeld * W / 4);
  uint8_t* there = device::carve<uint8_t>(cursor, W);
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

  // Of each row lse, delta, what makes Σ p one, and dlse: of the softmax over the sequence, or over
  // both, and then of the gated prefix.
  constexpr int kDelta = kHeld, kFactor = 2 * kHeld, kDLse = 3 * kHeld, kOfPrefix = 4 * kHeld;
  if (device::thread_x() < kHeld) {
    const int row = device::thread_x();
    const bool exists = row < count;
    numbers[row] = exists ? lse_of<T>(call.lse[first_row + row]) : INFINITY;
    numbers[kDLse + row] = exists && gradients.d_lse ? gradients.d_lse[first_row + row] : 0.0f;
    numbers[kOfPrefix + row] =
        exists && call.gate ? lse_of<T>(call.prefix_lse[first_row + row]) : INFINITY;
    numbers[kOfPrefix + kDLse + row] = 0.0f;
    for (int of_what = 0; of_what <= kOfPrefix; of_what += kOfPrefix) {
      numbers[of_what + kDelta + row] = 0.0f;
      numbers[of_what + kFactor + row] = 1.0f;
    }
  }
  device::sync_threads();
  if constexpr (!kExact) {
    const T* out = static_cast<const T*>(call.out) + first_row * d;
    PK_NO_UNROLL for (int row = device::warp(); row < count; row += kPrefixThreads / 32) {
      float sum = 0.0f;
      for (int i = device::lane(); i < d; i += 32)
        sum += to_float(d_out_data[offsets[kHeld + row] + i]) *
               to_float(out[static_cast<int64_t>(row) * d + i]);
      for (int mask = 16; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
      if (device::lane() == 0) numbers[kDelta + row] = sum;
    }
  }

  const float score_scale = call.scale * base_factor<T>();
  Values<T, kColumns> dq;
  dq.clear();
  float sum[kSlots], total[kSlots];
  PK_UNROLL for (int i = 0; i < kSlots; ++i) sum[i] = total[i] = 0.0f;
  // First the sums, then the gradient; each over the prefix, then over the sequence.
  PK_NO_UNROLL for (int step = 0; step < 4; ++step) {
    const bool sums_only = step < 2, of_prefix = step % 2 == 0, apart = of_prefix && call.gate;
    if (sums_only && !kExact && !apart) continue;
    if (step == 2) {
      device::sync_threads();
      if (device::thread_x() < count) {
        float* own = numbers + device::thread_x();
        const int64_t at = first_row + device::thread_x();
        if (device::block_y() == 0 && call.gate) {
          gradients.prefix_delta[at] = own[kOfPrefix + kDelta];
          gradients.prefix_correction[at] = own[kOfPrefix + kFactor];
        }
        if (call.gate) {
          const int head = (row0 + device::thread_x()) / static_cast<int>(call.queries);
          const float strength = tanhf(call.gate[of.head * of.group + head]);
          if (!kExact) own[kDelta] -= strength * own[kOfPrefix + kDelta];
          own[kOfPrefix + kFactor] *= strength;
        }
        if (device::block_y() == 0) {
          gradients.delta[at] = own[kDelta];
          gradients.correction[at] = own[kFactor];
        }
      }
      device::sync_threads();
      if (!gradients.d_query) break;
    }
    float* own = numbers + (apart ? kOfPrefix : 0);
    const KeyRange<T> range = key_range<T>(call, of.batch, of.head, of_prefix);
    const int begin = of_prefix ? 0 : start / W * W, end = of_prefix ? range.count : stop;
    PK_NO_UNROLL for (int n0 = begin; n0 < end; n0 += W) {
      ScorePanel<T> p, dp;
      p.clear();
      add_scores(p, stages, queries, range.keys(n0));
      // Whether a key is there for any row.
      if (device::thread_x() < W)
        there[device::thread_x()] = range.has(n0 + device::thread_x());
      if (call.dropout.seed)
        draw_keep<kHeld, W>(keep, call, first_row, count, range.first_group + n0 / 4);
      dp.clear();
      add_scores(dp, stages, d_outs, range.values(n0));
      float at_row[kSlots];
      PK_UNROLL for (int i = 0; i < kSlots; ++i) at_row[i] = own[ScorePanel<T>::row_of(i)];
      p.visit_slots([&](int slot, int column, float& score) {
        const int row = ScorePanel<T>::row_of(slot);
        const int n = n0 + column;
        const bool seen = there[column] && (!range.bounded ||
                                            (n >= bounds[row] && n < bounds[kHeld + row]));
        const float power = device::multiply_add(score, score_scale, -at_row[slot]);
        score = seen ? exponential<T>(power) : 0.0f;
      });
      if (call.dropout.seed)
        dp.visit_slots([&](int slot, int column, float& sum) {
          const bool kept = is_kept<W>(keep, ScorePanel<T>::row_of(slot), column);
          sum = kept ? sum * call.inverse_keep : 0.0f;
        });
      if (sums_only) {
        p.visit_with(dp, [&](int slot, int, float& one, float& other) {
          sum[slot] += one * other;
          total[slot] += one;
        });
        continue;
      }
      PK_UNROLL for (int i = 0; i < kSlots; ++i) {
        const float* numbers_of = own + ScorePanel<T>::row_of(i);
        at_row[i] = numbers_of[kFactor];
        sum[i] = numbers_of[kDelta];
        total[i] = numbers_of[kDLse];
      }
      p.visit_with(dp, [&](int slot, int column, float& one, float& other) {
        const float value = (other - sum[slot] + total[slot]) * one * at_row[slot];
        ds[ScorePanel<T>::row_of(slot) * padded<T>(W) + column] = from_float<T>(value);
      });
      add_values(dq, stages, ds, range.keys(n0), column0);
    }
    if (!sums_only || !(apart || step == 1)) continue;
    // Without a gate the sums go on over both.
    over_row<T>(sum, [](float a, float b) { return a + b; });
    over_row<T>(total, [](float a, float b) { return a + b; });
    PK_UNROLL for (int i = 0; i < kSlots; ++i) {
      const float correction = kExact && total[i] > 0.0f ? 1.0f / total[i] : 1.0f;
      if (device::lane() % ScorePanel<T>::kRowLanes == 0) {
        own[kDelta + ScorePanel<T>::row_of(i)] = sum[i] * correction;
        own[kFactor + ScorePanel<T>::row_of(i)] = correction;
      }
      sum[i] = total[i] = 0.0f;
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
