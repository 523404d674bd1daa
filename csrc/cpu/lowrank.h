// The three products of a low-rank factor with a block of rows, and the block itself.
//
// A block is up to kRows rows by kDepth columns of an activation, staged (and masked by dropout)
// once, then used for every product while it lies in the first-level cache:
//
//   project   S[m, j]  += sum_k V[m, k] P[k, j]          (s = x A^T, ds = dy B)
//   gradient  G[k, j]  += sum_m V[m, k] L[m, j]          (dA = x^T ds, dB = dy^T s)
//   expand    Y[m, n]   = before + factor * (bias + sum_j S[m, j] Q[j, n])   (s B^T, ds A)
//
// Portable widens to float32; lowrank_bf16.h has the same products on bfloat16 itself. Ranks are
// padded to kLanes, so that one vector holds sixteen of them. A sum is made in blocks, each from
// zero and then added: shorter chains of float32 additions than one running sum.
#pragma once

#include <algorithm>
#include <vector>

#include "philox.h"
#include "vec.h"

namespace pk {

constexpr int64_t kStrip = 8;
constexpr int64_t kGradientRows = 2 * kStrip;  // G is padded to a multiple
constexpr int64_t kChain = 32;            // additions in a row
constexpr int64_t kColumns = 4 * kLanes;  // of a tile of Q

// Where the tile of Q whose first column is `column` begins.
PK_INLINE int64_t tile_at(int64_t column, int64_t ranks) { return column * round_up(ranks, 2); }

PK_INLINE void add_to(float* p, vf v) { store(p, load(p) + v); }

// What expand does to a sum before it is stored. Every pointer may be null; vectors have one element
// for each column.
template <typename T>
struct Epilogue {
  const float* bias;
  const uint32_t* keep;  // dropout: all ones or zero, for the block's rows one after the other
  int64_t keep_stride;
  const float* factor;
  const T* before;  // row 0 of what `rows` counts in
  int64_t before_stride;
};

// to[0, count) = before + factor * line.
template <typename T>
PK_INLINE void store_row(const float* line, const float* factor, const T* before, int64_t count, T* to) {
  if (before && factor) {
    for (int64_t n = 0; n < count; ++n) from_float(line[n] * factor[n] + to_float(before[n]), to + n);
  } else if (before) {
    for (int64_t n = 0; n < count; ++n) from_float(line[n] + to_float(before[n]), to + n);
  } else if (factor) {
    for (int64_t n = 0; n < count; ++n) from_float(line[n] * factor[n], to + n);
  } else {
    for (int64_t n = 0; n < count; ++n) from_float(line[n], to + n);
  }
}

// sums[depth] += the sum over the rows of V.
template <typename Work>
PK_INLINE void add_column_sums(const Work* v, int64_t rows, int64_t depth, float* sums) {
  float block[kDepth] = {};
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < kDepth; ++k) block[k] += to_float(v[m * kDepth + k]);
  for (int64_t k = 0; k < depth; ++k) sums[k] += block[k];
}

template <typename T>
struct Portable {
  using Element = T;
  using Work = float;
  static constexpr int64_t kRows = 16;
  static constexpr int64_t kForwardRows = 16;

  // Where element (i, j) of P, Q or L lies, i being the index of the reduction.
  static PK_INLINE int64_t at(int64_t i, int64_t j, int64_t stride) { return i * stride + j; }
  static PK_INLINE float work(T value) { return to_float(value); }
  static PK_INLINE void store_rounded(float* to, vf v) { store(to, rounded<T>(v)); }  // to T

  // V[rows.count, kDepth] = rows of x, zero beyond `depth` and in the rows of the last strip.
  static PK_INLINE void stage(
      const T* x, int64_t stride, const Rows& rows, int64_t depth, float* v) {
    for (int64_t m = 0; m < rows.count; ++m) {
      const T* in = x + rows[m] * stride;
      float* out = v + m * kDepth;
      for (int64_t k = 0; k < depth; ++k) out[k] = to_float(in[k]);
      for (int64_t k = depth; k < kDepth; ++k) out[k] = 0.0f;
    }
    std::fill(v + rows.count * kDepth, v + kRows * kDepth, 0.0f);
  }

  // Zero the dropped elements of V; keep[m, k] holds all ones or zero.
  static PK_INLINE void apply_mask(const uint32_t* keep, int64_t rows, float* v) {
    for (int64_t i = 0; i < rows * kDepth; ++i) {
      uint32_t bits;
      std::memcpy(&bits, v + i, sizeof(bits));
      bits &= keep[i];
      std::memcpy(v + i, &bits, sizeof(bits));
    }
  }

  // S[kRows, ranks] += V P, P being [depth, ranks] (ranks a multiple of kLanes).
  static PK_INLINE void project(
      const float* v, const float* p, int64_t rows, int64_t depth, int64_t ranks, float* s) {
    for (int64_t m = 0; m < rows; m += kStrip) {
      for (int64_t j = 0; j < ranks; j += kLanes) {
        const float* column = v + m * kDepth;
        vf total[kStrip] = {};
        for (int64_t k0 = 0; k0 < depth; k0 += kChain) {
          vf acc[kStrip] = {};
          const int64_t k1 = std::min(depth, k0 + kChain);
          for (int64_t k = k0; k < k1; ++k) {
            const vf weights = load(p + k * ranks + j);
            PK_UNROLL for (int64_t i = 0; i < kStrip; ++i) acc[i] += column[i * kDepth + k] * weights;
          }
          PK_UNROLL for (int64_t i = 0; i < kStrip; ++i) total[i] += acc[i];
        }
        PK_UNROLL for (int64_t i = 0; i < kStrip; ++i) add_to(s + (m + i) * ranks + j, total[i]);
      }
    }
  }

  // G[depth rounded up to kGradientRows, ranks] += V^T L, L being [kRows, ranks], zero beyond `rows`;
  // a fresh G is written, not added to.
  static PK_INLINE void gradient(
      const float* v, const float* l, int64_t rows, int64_t depth, int64_t ranks, bool fresh,
      float* g) {
    for (int64_t k = 0; k < depth; k += kStrip) {
      for (int64_t j = 0; j < ranks; j += kLanes) {
        vf acc[kStrip] = {};
        for (int64_t m = 0; m < rows; ++m) {
          const vf factor = load(l + m * ranks + j);
          const float* row = v + m * kDepth + k;
          PK_UNROLL for (int64_t i = 0; i < kStrip; ++i) acc[i] += row[i] * factor;
        }
        PK_UNROLL for (int64_t i = 0; i < kStrip; ++i) {
          float* to = g + (k + i) * ranks + j;
          store(to, fresh ? acc[i] : load(to) + acc[i]);
        }
      }
    }
  }

  // Rows of Y, `columns` wide, = S Q and the epilogue. Q is tiles of kColumns columns, each [ranks
  // rounded up to 2, kColumns], zero beyond `columns`, as are the epilogue's vectors; S has row
  // stride s_stride.
  static PK_INLINE void expand(
      const float* s, int64_t s_stride, const float* q, const Epilogue<T>& after, const Rows& rows,
      int64_t ranks, int64_t columns, T* y, int64_t y_stride) {
    constexpr int64_t kWide = 2 * kLanes;
    for (int64_t n = 0; n < columns; n += kWide) {
      const float* factors = q + tile_at(n / kColumns * kColumns, ranks) + n % kColumns;
      const int64_t count = std::min(kWide, columns - n);
      for (int64_t m = 0; m < rows.count; m += kStrip) {
        float tile[kStrip * kWide];
        for (int64_t j0 = 0; j0 < ranks; j0 += kChain) {
          vf low[kStrip] = {}, high[kStrip] = {};
          const int64_t j1 = std::min(ranks, j0 + kChain);
          for (int64_t j = j0; j < j1; ++j) {
            const vf first = load(factors + j * kColumns);
            const vf second = load(factors + j * kColumns + kLanes);
            PK_UNROLL for (int64_t i = 0; i < kStrip; ++i) {
              const float factor = s[(m + i) * s_stride + j];
              low[i] += factor * first;
              high[i] += factor * second;
            }
          }
          // What the sum so far is: of the first block the bias, of the others the tile.
          const float* before = j0 ? tile : after.bias;
          const int64_t stride = j0 ? kWide : 0, start = j0 ? 0 : n;
          PK_UNROLL for (int64_t i = 0; before && i < kStrip; ++i) {
            low[i] += load(before + start + i * stride);
            high[i] += load(before + start + i * stride + kLanes);
          }
          PK_UNROLL for (int64_t i = 0; i < kStrip; ++i) {
            store(tile + i * kWide, low[i]);
            store(tile + i * kWide + kLanes, high[i]);
          }
        }
        const int64_t valid = std::min(kStrip, rows.count - m);
        for (int64_t i = 0; i < valid; ++i) {
          float* line = tile + i * kWide;
          const int64_t row = rows[m + i];
          if (after.keep) {
            const uint32_t* mask = after.keep + (m + i) * after.keep_stride + n;
            for (int64_t c = 0; c < kWide; ++c) {
              uint32_t bits;
              std::memcpy(&bits, line + c, sizeof(bits));
              bits &= mask[c];
              std::memcpy(line + c, &bits, sizeof(bits));
            }
          }
          const T* before = after.before ? after.before + row * after.before_stride + n : nullptr;
          const float* factor = after.factor ? after.factor + n : nullptr;
          T* out = y + row * y_stride + n;
          if (count == kWide) {
            store_row(line, factor, before, kWide, out);
          } else {
            store_row(line, factor, before, count, out);
          }
        }
      }
    }
  }
};

}  // namespace pk
