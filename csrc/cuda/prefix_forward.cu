// Grid (tiles of 64 rows, batch, key heads; slices of the head size): online softmax over the
// prefix, then over the blocks of the sequence that some row of the tile sees.
//
// Read: q, k and v by panels from L2; the prefix in place for every sample. Written: out and lse
// once. Gated, the prefix comes last and twice: once for its normaliser, once for its values, so
// that one accumulator is enough, and the sequence is bit for bit what it is without a prefix.
#include "prefix_scores.h"

namespace pk {
namespace {

enum class Phase { kPrefix, kSequence, kNormaliser, kGated };

template <typename T>
constexpr int kForwardShared = device::carved_bytes(kHeld * sizeof(int64_t)) +
                               device::carved_bytes(2 * kHeld * sizeof(int)) +
                               device::carved_bytes(kHeld * kWide<T> / 4) +
                               device::carved_bytes(kHeldElements<T> * sizeof(T)) +
                               device::carved_bytes(2 * kPanelStage<T> * sizeof(T));

template <typename T, int kColumns>
PK_KERNEL PK_LAUNCH_BOUNDS(kPrefixThreads, 1) void prefix_forward_kernel(PrefixCall call) {
  constexpr int W = kWide<T>, kSlots = ScorePanel<T>::kSlots;
  char* cursor = device::shared_memory();
  int64_t* offsets = device::carve<int64_t>(cursor, kHeld);
  int* bounds = device::carve<int>(cursor, 2 * kHeld);
  uint8_t* keep = device::carve<uint8_t>(cursor, kHeld * W / 4);
  T* p = device::carve<T>(cursor, kHeldElements<T>);
  T* stages = device::carve<T>(cursor, 2 * kPanelStage<T>);

  const int pairs = static_cast<int>(call.batch * call.kv_heads), tiles = device::grid_x() / pairs;
  const int pair = device::block_x() / tiles;
  // Under a causal mask the last rows see the most: they start first.
  const int row0 = (tiles - 1 - device::block_x() % tiles) * kHeld;
  const int column0 = device::block_y() * kColumns;
  const KeyHead of = key_head(call, pair / call.kv_heads, pair % call.kv_heads);
  const int count = of.rows - row0 < kHeld ? of.rows - row0 : kHeld;
  if (device::thread_x() < kHeld) {
    const int row = device::thread_x();
    const bool exists = row < count;
    const Interval seen =
        exists ? seen_keys(call, (row0 + row) % static_cast<int>(call.queries)) : Interval{0, 0};
    offsets[row] = exists ? row_offset(call, of, call.query, row0 + row) : 0;
    bounds[row] = seen.first;
    bounds[kHeld + row] = seen.last;
  }
  device::sync_threads();
  int start = static_cast<int>(call.keys), stop = 0;
  for (int row = 0; row < count; ++row) {
    start = bounds[row] < start ? bounds[row] : start;
    stop = bounds[kHeld + row] > stop ? bounds[kHeld + row] : stop;
  }

  const PanelLines<T> queries{static_cast<const T*>(call.query.data), offsets, 0, count,
                              static_cast<int>(call.head_size), call.query.aligned};
  const float score_scale = call.scale * base_factor<T>();
  Values<T, kColumns> out;
  out.clear();
  float row_max[kSlots], row_sum[kSlots], factor[kSlots];
  const auto forget = [&] {
    PK_UNROLL for (int i = 0; i < kSlots; ++i) row_max[i] = -1e30f, row_sum[i] = 0.0f;
  };
  // Store the lse of what was seen; factor becomes what makes its probabilities sum to one.
  const auto finish = [&](float* lse) {
    over_row<T>(row_sum, [](float a, float b) { return a + b; });
    PK_UNROLL for (int i = 0; i < kSlots; ++i) {
      const int row = ScorePanel<T>::row_of(i);
      if (device::block_y() == 0 && row < count && device::lane() % ScorePanel<T>::kRowLanes == 0)
        lse[of.first_row + row0 + row] = log_sum<T>(row_max[i], row_sum[i]);
      factor[i] = call.inverse_keep / (row_sum[i] > 0.0f ? row_sum[i] : 1.0f);
    }
  };
  float unit[kSlots];
  PK_UNROLL for (int i = 0; i < kSlots; ++i) unit[i] = factor[i] = 1.0f;
  forget();

  const int phases = call.gate ? 3 : 2;
  PK_NO_UNROLL for (int step = 0; step < phases; ++step) {
    const Phase phase = !call.gate ? (step == 0 ? Phase::kPrefix : Phase::kSequence)
                        : step == 0 ? Phase::kSequence
                                    : (step == 1 ? Phase::kNormaliser : Phase::kGated);
    const bool of_prefix = phase != Phase::kSequence;
    const KeyRange<T> range = key_range<T>(call, of.batch, of.head, of_prefix);
    int begin = of_prefix ? 0 : start / W * W, end = of_prefix ? range.count : stop;
    if (phase == Phase::kGated) {
      // Zeros would add nothing but the sign of a zero.
      bool open = false;
      for (int head = row0 / static_cast<int>(call.queries);
           head <= (row0 + count - 1) / static_cast<int>(call.queries); ++head)
        open = open || call.gate[of.head * of.group + head] != 0.0f;
      if (!open) end = 0;
      PK_UNROLL for (int i = 0; i < kSlots; ++i) {
        const int row = ScorePanel<T>::row_of(i) < count ? ScorePanel<T>::row_of(i) : 0;
        const int head = (row0 + row) / static_cast<int>(call.queries);
        factor[i] *= tanhf(call.gate[of.head * of.group + head]);
        unit[i] = power_of_two(factor[i]);
        factor[i] /= unit[i];
        row_sum[i] = 1.0f / unit[i];
      }
      out.scale(row_sum);
    }
    PK_NO_UNROLL for (int n0 = begin; n0 < end; n0 += W) {
      const bool drops = call.dropout.seed && phase != Phase::kNormaliser;
      if (drops)
        draw_keep<kHeld, W>(
            keep, call, of.first_row + row0, count, range.first_group + n0 / 4);
      ScorePanel<T> scores;
      scores.clear();
      add_scores(scores, stages, queries, range.keys(n0));
      float new_max[kSlots];
      PK_UNROLL for (int i = 0; i < kSlots; ++i) new_max[i] = row_max[i];
      scores.visit_slots([&](int slot, int column, float& score) {
        const int row = ScorePanel<T>::row_of(slot);
        const bool seen = range.sees(n0 + column, bounds[row], bounds[kHeld + row]);
        score = seen ? score * score_scale : -INFINITY;
        new_max[slot] = score > new_max[slot] ? score : new_max[slot];
      });
      if (phase != Phase::kGated) {
        over_row<T>(new_max, [](float a, float b) { return a > b ? a : b; });
        float shrink[kSlots];
        PK_UNROLL for (int i = 0; i < kSlots; ++i) {
          shrink[i] = exponential<T>(row_max[i] - new_max[i]);
          row_max[i] = new_max[i];
          row_sum[i] *= shrink[i];
        }
        if (phase != Phase::kNormaliser) out.scale(shrink);
      }
      scores.visit_slots([&](int slot, int, float& score) {
        score = exponential<T>(score - row_max[slot]);
        if (phase == Phase::kGated)
          score *= factor[slot];
        else
          row_sum[slot] += score;
      });
      if (phase == Phase::kNormaliser) continue;
      write_panel(scores, p, [&](int slot, int column, float score) {
        return drops && !is_kept<W>(keep, ScorePanel<T>::row_of(slot), column) ? 0.0f : score;
      });
      add_values(out, stages, p, range.values(n0), column0);
    }
    if (phase == Phase::kSequence) {
      finish(call.lse);
      out.scale(factor);
      forget();
    } else if (phase == Phase::kNormaliser) {
      finish(call.prefix_lse);
    }
  }
  out.scale(unit);
  store_values(
      out, p, static_cast<T*>(call.out) + (of.first_row + row0) * call.head_size, call.head_size,
      count, column0, 1.0f);
}

template <typename T, int kColumns>
int launch_forward(const PrefixCall& call, device::Stream stream) {
  const int64_t rows = call.heads / call.kv_heads * call.queries;
  return device::launch(
      "prefix_forward_kernel", prefix_forward_kernel<T, kColumns>,
      {call.batch * call.kv_heads * ((rows + kHeld - 1) / kHeld),
       (call.head_size + kColumns - 1) / kColumns},
      kPrefixThreads, kForwardShared<T>, stream, call);
}

template <typename T>
int launch_forward(const PrefixCall& call, device::Stream stream) {
  return call.head_size <= 64 ? launch_forward<T, 64>(call, stream)
                              : launch_forward<T, 128>(call, stream);
}

}  // namespace

int prefix_forward(const PrefixCall& call, device::Stream stream) {
  switch (call.type) {
    case Type::kFloat16: return launch_forward<Half>(call, stream);
    case Type::kBFloat16: return launch_forward<BFloat16>(call, stream);
    default: return launch_forward<float>(call, stream);
  }
}

}  // namespace pk
