// Products of prefix attention: panels of 64 held lines against panels of as many lines as 128
// bytes hold elements, all of that width, streamed through shared memory.
//
//   scores [64, W] = held [64, d] streamed [W, d]^T           over panels of the depth d
//   values [64, columns] += p [64, W] streamed [W, columns]   over panels of the columns
//
// Forward and the gradient of queries hold rows and stream keys; the gradient of keys holds keys
// and streams rows. What is streamed twice comes from the L2 cache: two stages and p fit every
// GPU's shared memory for any head size.
#pragma once

#include "prefix.h"
#include "tile_product.h"

namespace pk {

constexpr int kHeld = 64;
constexpr int kPrefixThreads = 128;
template <typename T>
constexpr int kWide = 128 / static_cast<int>(sizeof(T));

// Each warp has 16 whole lines of the 16-bit product: their sums need no other warp.
template <typename T>
using PanelShape = Shape<kHeld, kWide<T>, kWide<T>, 4, 1, kWide<T> / 4>;
template <typename T>
using ScorePanel = Product<T, PanelShape<T>, true, true>;
template <typename T>
using ValuePanel = Product<T, PanelShape<T>, true, false>;

// The columns of values that a block makes: 64, or 128 of larger heads. Heads larger still take
// several blocks, each of which makes the scores again.
template <typename T, int kColumns>
struct Values {
  static constexpr int kPanels = kColumns / kWide<T>;
  static constexpr int kSlots = ValuePanel<T>::kSlots;

  ValuePanel<T> panel[kPanels];

  PK_DEVICE void clear() {
    PK_UNROLL for (int i = 0; i < kPanels; ++i) panel[i].clear();
  }
  // Multiply every row with its number.
  PK_DEVICE void scale(const float (&factor)[kSlots]) {
    PK_UNROLL for (int i = 0; i < kPanels; ++i)
      panel[i].visit_slots([&](int slot, int, float& sum) { sum *= factor[slot]; });
  }
};

template <typename T>
constexpr int kHeldElements = kHeld * padded<T>(kWide<T>);
template <typename T>
constexpr int kStreamedElements = kWide<T> * padded<T>(kWide<T>);
template <typename T>
constexpr int kPanelStage = kHeldElements<T> + kStreamedElements<T>;

// Lines of `length` elements: line i starts at base + offsets[i] (in shared memory), or i * stride.
template <typename T>
struct PanelLines {
  const T* base;
  const int64_t* offsets;
  int64_t stride;
  int count, length;
  bool aligned;
};

// Bring kLines lines, elements [begin, begin + W), to shared memory; zeros where there are none.
template <int kLines, typename T>
PK_DEVICE void load_panel(T* panel, const PanelLines<T>& from, int begin) {
  constexpr int kPack = kPackOf16<T>, kPerLine = kWide<T> / kPack;
  constexpr int kStep = kPrefixThreads / kPerLine;
  static_assert(kLines % kStep == 0);
  const int first = device::thread_x() / kPerLine, offset = device::thread_x() % kPerLine * kPack;
  const int left = from.length - begin - offset;
  PK_UNROLL for (int i = 0; i < kLines / kStep; ++i) {
    const int line = first + i * kStep;
    const bool inside = line < from.count && left > 0;
    T* target = panel + line * padded<T>(kWide<T>) + offset;
    const T* source = from.base;
    if (inside) source += (from.offsets ? from.offsets[line] : line * from.stride) + begin + offset;
    if (from.aligned && (left >= kPack || !inside)) {
      device::cp_async_16(target, source, inside);
    } else {
      Pack<T, kPack> pack;
      PK_UNROLL for (int j = 0; j < kPack; ++j)
        pack[j] = inside && j < left ? source[j] : zero<T>();
      store_pack(target, pack);
    }
  }
}

// scores += held streamed^T over the whole depth. Ends with a barrier: shared memory is free.
template <typename T>
PK_DEVICE void add_scores(
    ScorePanel<T>& scores, T* stages, const PanelLines<T>& held, const PanelLines<T>& streamed) {
  const auto load = [&](int begin) {
    T* stage = stages + begin / kWide<T> % 2 * kPanelStage<T>;
    load_panel<kHeld>(stage, held, begin);
    load_panel<kWide<T>>(stage + kHeldElements<T>, streamed, begin);
    device::cp_async_commit();
  };
  load(0);
  PK_NO_UNROLL for (int begin = 0; begin < held.length; begin += kWide<T>) {
    device::cp_async_wait<0>();
    // This step's panels are there for all, and the last step's are no longer read.
    device::sync_threads();
    if (begin + kWide<T> < held.length) load(begin + kWide<T>);
    const T* stage = stages + begin / kWide<T> % 2 * kPanelStage<T>;
    scores.multiply(stage, stage + kHeldElements<T>);
  }
  device::sync_threads();
}

// values += p streamed, columns [first, ...) of streamed. What was written to shared memory before
// is there for all. Ends with a barrier.
template <typename T, int kColumns>
PK_DEVICE void add_values(
    Values<T, kColumns>& values, T* stages, const T* p, const PanelLines<T>& streamed, int first) {
  constexpr int kPanels = Values<T, kColumns>::kPanels;
  const auto load = [&](int panel) {
    const int begin = first + panel * kWide<T>;
    if (begin < streamed.length)
      load_panel<kWide<T>>(stages + panel % 2 * kPanelStage<T>, streamed, begin);
    device::cp_async_commit();
  };
  load(0);
  PK_UNROLL for (int panel = 0; panel < kPanels; ++panel) {
    device::cp_async_wait<0>();
    device::sync_threads();
    if (panel + 1 < kPanels) load(panel + 1);
    if (first + panel * kWide<T> < streamed.length)
      values.panel[panel].multiply(p, stages + panel % 2 * kPanelStage<T>);
  }
  device::sync_threads();
}

// Write f(slot, column, score) of each score to a panel of T.
template <typename T, typename F>
PK_DEVICE void write_panel(ScorePanel<T>& scores, T* panel, F f) {
  scores.visit_slots([&](int slot, int column, float& score) {
    panel[ScorePanel<T>::row_of(slot) * padded<T>(kWide<T>) + column] =
        from_float<T>(f(slot, column, score));
  });
}

// Store values times factor as rows of d elements, the first `count`, columns [first, ...), by way
// of a panel so that neighbours are written together.
template <typename T, int kColumns>
PK_DEVICE void store_values(
    Values<T, kColumns>& values, T* shared, T* rows, int64_t d, int count, int first,
    float factor) {
  constexpr int kPack = kPackOf16<T>, kPerLine = kWide<T> / kPack;
  const bool aligned = is_aligned(rows, 16) && d % kPack == 0;
  PK_UNROLL for (int panel = 0; panel < Values<T, kColumns>::kPanels; ++panel) {
    values.panel[panel].visit([&](int row, int column, float& sum) {
      shared[row * padded<T>(kWide<T>) + column] = from_float<T>(sum * factor);
    });
    device::sync_threads();
    PK_NO_UNROLL for (int i = device::thread_x(); i < count * kPerLine; i += kPrefixThreads) {
      const int row = i / kPerLine, within = i % kPerLine * kPack;
      const int64_t column = first + panel * kWide<T> + within;
      if (column >= d) continue;
      const auto pack = load_pack<T, kPack>(shared + row * padded<T>(kWide<T>) + within);
      T* target = rows + row * d + column;
      if (aligned) {
        store_pack(target, pack);
      } else {
        PK_UNROLL for (int j = 0; j < kPack; ++j)
          if (column + j < d) target[j] = pack[j];
      }
    }
    device::sync_threads();
  }
}

// Combine a number of each slot over the lanes that share its row, in a fixed order.
template <typename T, typename Combine>
PK_DEVICE void over_row(float (&numbers)[ScorePanel<T>::kSlots], Combine combine) {
  PK_UNROLL for (int slot = 0; slot < ScorePanel<T>::kSlots; ++slot)
    PK_UNROLL for (int mask = 1; mask < ScorePanel<T>::kRowLanes; mask *= 2)
      numbers[slot] = combine(numbers[slot], device::shuffle_xor(numbers[slot], mask));
}

}  // namespace pk
