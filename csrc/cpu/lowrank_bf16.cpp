#include "lowrank_bf16.h"

#include "dots.h"

#ifdef PK_NATIVE
// GCC 12 warns of the deliberately undefined operands inside its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#define PK_NATIVE_INLINE PK_NATIVE inline __attribute__((always_inline))

namespace pk {
namespace {

constexpr int64_t kPiece = 32;   // columns interleaved at a time

PK_NATIVE_INLINE __m512bh pairs(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

PK_NATIVE_INLINE void prefetch(const bfloat16* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// One pair of a row in every lane.
PK_NATIVE_INLINE __m512bh one_pair(const bfloat16* p) {
  int bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}

// S[rows i, vectors of ranks] += V P for R rows and C vectors.
template <int R, int C>
PK_NATIVE_INLINE void project_tile(
    const bfloat16* v, const bfloat16* p, int64_t count, int64_t ranks, float* s) {
  __m512 acc[R][C] = {};
  for (int64_t k = 0; k < count; ++k) {
    __m512bh weights[C];
    PK_UNROLL for (int c = 0; c < C; ++c) weights[c] = pairs(p + 2 * (k * ranks + c * kLanes));
    PK_UNROLL for (int i = 0; i < R; ++i) {
      const __m512bh value = one_pair(v + i * kDepth + 2 * k);
      PK_UNROLL for (int c = 0; c < C; ++c)
        acc[i][c] = _mm512_dpbf16_ps(acc[i][c], value, weights[c]);
    }
  }
  PK_UNROLL for (int i = 0; i < R; ++i)
    PK_UNROLL for (int c = 0; c < C; ++c) {
      float* to = s + i * ranks + c * kLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[i][c]));
    }
}

// G[columns k of V, vectors of ranks] (+)= V^T L for R columns and C vectors.
template <int R, int C>
PK_NATIVE_INLINE void gradient_tile(
    const bfloat16* vt, const bfloat16* l, int64_t count, int64_t ranks, bool fresh, float* g) {
  __m512 acc[R][C] = {};
  if (!fresh)
    PK_UNROLL for (int i = 0; i < R; ++i)
      PK_UNROLL for (int c = 0; c < C; ++c) acc[i][c] = _mm512_loadu_ps(g + i * ranks + c * kLanes);
  for (int64_t m = 0; m < count; ++m) {
    __m512bh factors[C];
    PK_UNROLL for (int c = 0; c < C; ++c) factors[c] = pairs(l + 2 * (m * ranks + c * kLanes));
    PK_UNROLL for (int i = 0; i < R; ++i) {
      const __m512bh value = one_pair(vt + 2 * (m * kPiece + i));
      PK_UNROLL for (int c = 0; c < C; ++c)
        acc[i][c] = _mm512_dpbf16_ps(acc[i][c], value, factors[c]);
    }
  }
  PK_UNROLL for (int i = 0; i < R; ++i)
    PK_UNROLL for (int c = 0; c < C; ++c) _mm512_storeu_ps(g + i * ranks + c * kLanes, acc[i][c]);
}

// Rows 2 m and 2 m + 1 of kPiece columns of V side by side: [rows / 2][kPiece][2].
PK_NATIVE_INLINE void interleave(const bfloat16* v, int64_t count, bfloat16* vt) {
  alignas(64) int16_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<int16_t>(i / 2 + (i % 2) * 32);
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  for (int64_t m = 0; m < count; ++m) {
    const bfloat16* from = v + 2 * m * kDepth;
    const __m512i even = _mm512_loadu_si512(from), odd = _mm512_loadu_si512(from + kDepth);
    _mm512_store_si512(vt + 2 * m * kPiece, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(vt + 2 * m * kPiece + 32, _mm512_permutex2var_epi16(even, high, odd));
  }
}

PK_NATIVE_INLINE __m512 widened(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

PK_NATIVE_INLINE __mmask32 first(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0 : (1u << count) - 1;
}

// Store 32 columns of a row, the block's `place`-th, or the first `count`, after the epilogue.
PK_NATIVE_INLINE void store_row(
    __m512 low, __m512 high, const Epilogue<bfloat16>& after, int64_t place, int64_t row,
    int64_t column, int64_t count, bfloat16* y) {
  if (after.bias) {
    low = _mm512_add_ps(low, _mm512_loadu_ps(after.bias + column));
    high = _mm512_add_ps(high, _mm512_loadu_ps(after.bias + column + kLanes));
  }
  if (after.keep) {
    const uint32_t* keep = after.keep + place * after.keep_stride + column;
    low = _mm512_and_ps(low, _mm512_loadu_ps(keep));
    high = _mm512_and_ps(high, _mm512_loadu_ps(keep + kLanes));
  }
  if (after.factor) {
    low = _mm512_mul_ps(low, _mm512_loadu_ps(after.factor + column));
    high = _mm512_mul_ps(high, _mm512_loadu_ps(after.factor + column + kLanes));
  }
  const __mmask32 valid = first(count);
  if (after.before) {
    const bfloat16* from = after.before + row * after.before_stride + column;
    const __m512i before =
        count >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(valid, from);
    low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(before)));
    high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(before, 1)));
  }
  const __m512i sum = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (count >= 32) {
    _mm512_storeu_si512(y, sum);
  } else {
    _mm512_mask_storeu_epi16(y, valid, sum);
  }
}

}  // namespace

PK_NATIVE void NativeBFloat16::stage(
    const bfloat16* x, int64_t stride, const Rows& rows, int64_t depth, bfloat16* v) {
  for (int64_t m = 0; m < rows.count; ++m) {
    const bfloat16* row = x + rows[m] * stride;
    for (int64_t k = 0; k < kDepth; k += 32) {
      prefetch(row + k + kDepth);  // of the next block
      _mm512_storeu_si512(v + m * kDepth + k, _mm512_maskz_loadu_epi16(first(depth - k), row + k));
    }
  }
  // The tiles take kStrip or twice as many rows.
  const int64_t filled = round_up(rows.count, 2 * kStrip);
  std::memset(v + rows.count * kDepth, 0, (filled - rows.count) * kDepth * sizeof(bfloat16));
}

PK_NATIVE void NativeBFloat16::apply_mask(const uint32_t* keep, int64_t rows, bfloat16* v) {
  for (int64_t i = 0; i < rows * kDepth; i += kLanes) {
    const __m256i mask = _mm512_cvtepi32_epi16(_mm512_loadu_si512(keep + i));
    __m256i* to = reinterpret_cast<__m256i*>(v + i);
    _mm256_storeu_si256(to, _mm256_and_si256(_mm256_loadu_si256(to), mask));
  }
}

PK_NATIVE void NativeBFloat16::project(
    const bfloat16* v, const bfloat16* p, int64_t rows, int64_t depth, int64_t ranks, float* s) {
  const int64_t count = (depth + 1) / 2;
  int64_t j = 0;
  for (; j + 4 * kLanes <= ranks; j += 4 * kLanes)
    for (int64_t m = 0; m < rows; m += kStrip / 2)
      project_tile<kStrip / 2, 4>(v + m * kDepth, p + 2 * j, count, ranks, s + m * ranks + j);
  for (; j + 2 * kLanes <= ranks; j += 2 * kLanes)
    for (int64_t m = 0; m < rows; m += kStrip)
      project_tile<kStrip, 2>(v + m * kDepth, p + 2 * j, count, ranks, s + m * ranks + j);
  for (int64_t m = 0; j < ranks && m < rows; m += 2 * kStrip)
    project_tile<2 * kStrip, 1>(v + m * kDepth, p + 2 * j, count, ranks, s + m * ranks + j);
}

PK_NATIVE void NativeBFloat16::gradient(
    const bfloat16* v, const bfloat16* l, int64_t rows, int64_t depth, int64_t ranks, bool fresh,
    float* g) {
  alignas(64) bfloat16 vt[kRows * kPiece];
  const int64_t count = (rows + 1) / 2;
  for (int64_t piece = 0; piece < depth; piece += kPiece) {
    interleave(v + piece, count, vt);
    const int64_t end = std::min(kPiece, depth - piece);
    float* to = g + piece * ranks;
    int64_t j = 0;
    for (; j + 2 * kLanes <= ranks; j += 2 * kLanes)
      for (int64_t k = 0; k < end; k += kStrip)
        gradient_tile<kStrip, 2>(vt + 2 * k, l + 2 * j, count, ranks, fresh, to + k * ranks + j);
    for (int64_t k = 0; j < ranks && k < end; k += 2 * kStrip)
      gradient_tile<2 * kStrip, 1>(vt + 2 * k, l + 2 * j, count, ranks, fresh, to + k * ranks + j);
  }
}

PK_NATIVE void NativeBFloat16::expand(
    const bfloat16* s, int64_t s_stride, const bfloat16* q, const Epilogue<bfloat16>& after,
    const Rows& rows, int64_t ranks, int64_t columns, bfloat16* y, int64_t y_stride) {
  constexpr int R = 4, C = 4;
  const int64_t count = (ranks + 1) / 2;
  for (int64_t n = 0; n < columns; n += kColumns) {
    const bfloat16* tile = q + tile_at(n, ranks);
    for (int64_t m = 0; m < rows.count; m += R) {
      int64_t row[R];
      PK_UNROLL for (int i = 0; i < R; ++i) row[i] = rows[std::min(m + i, rows.count - 1)];
      PK_UNROLL for (int i = 0; i < R; ++i) {  // the next columns: rows lie pages apart
        const int64_t column = n + kColumns;
        prefetch(y + row[i] * y_stride + column);
        prefetch(y + row[i] * y_stride + column + 32);
        if (after.before) {
          prefetch(after.before + row[i] * after.before_stride + column);
          prefetch(after.before + row[i] * after.before_stride + column + 32);
        }
      }
      __m512 acc[R][C] = {};
      for (int64_t j = 0; j < count; ++j) {
        __m512bh weights[C];
        PK_UNROLL for (int c = 0; c < C; ++c)
          weights[c] = pairs(tile + 2 * (j * kColumns + c * kLanes));
        PK_UNROLL for (int i = 0; i < R; ++i) {
          const __m512bh value = one_pair(s + (m + i) * s_stride + 2 * j);
          PK_UNROLL for (int c = 0; c < C; ++c)
            acc[i][c] = _mm512_dpbf16_ps(acc[i][c], value, weights[c]);
        }
      }
      PK_UNROLL for (int i = 0; i < R; ++i) {
        if (m + i >= rows.count) break;
        PK_UNROLL for (int c = 0; c < C; c += 2) {
          const int64_t column = n + c * kLanes;
          if (column >= columns) break;
          store_row(
              acc[i][c], acc[i][c + 1], after, m + i, row[i], column, columns - column,
              y + row[i] * y_stride + column);
        }
      }
    }
  }
}

template <int R>
PK_NATIVE void dots(
    const bfloat16* v, int64_t v_stride, const bfloat16* w, int64_t count, int64_t rows, float* line) {
  constexpr int C = kLanes / R;
  for (int64_t n0 = 0; n0 < std::min(rows, kLanes); n0 += C) {
    const bfloat16* row[C];
    PK_UNROLL for (int c = 0; c < C; ++c) row[c] = w + std::min(n0 + c, rows - 1) * count;
    __m512 acc[kLanes] = {};
    for (int64_t k = 0; k < count; k += 32) {
      const __mmask32 valid = first(count - k);
      __m512bh x[R];
      PK_UNROLL for (int i = 0; i < R; ++i)
        x[i] = (__m512bh)_mm512_maskz_loadu_epi16(valid, v + i * v_stride + k);
      PK_UNROLL for (int c = 0; c < C; ++c) {
        const __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(valid, row[c] + k);
        PK_UNROLL for (int i = 0; i < R; ++i)
          acc[i * C + c] = _mm512_dpbf16_ps(acc[i * C + c], x[i], weights);
      }
    }
    vf sum[kLanes];
    PK_UNROLL for (int i = 0; i < kLanes; ++i) sum[i] = (vf)acc[i];
    float lanes[kLanes];
    store(lanes, sums_of(sum));
    PK_UNROLL for (int i = 0; i < R; ++i) std::memcpy(line + i * kLanes + n0, lanes + i * C, C * sizeof(float));
  }
}

template PK_NATIVE void dots<1>(const bfloat16*, int64_t, const bfloat16*, int64_t, int64_t, float*);
template PK_NATIVE void dots<2>(const bfloat16*, int64_t, const bfloat16*, int64_t, int64_t, float*);
template PK_NATIVE void dots<4>(const bfloat16*, int64_t, const bfloat16*, int64_t, int64_t, float*);

}  // namespace pk
#endif  // PK_NATIVE
