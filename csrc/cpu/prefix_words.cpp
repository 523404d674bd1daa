#include "prefix_words.h"

#include <algorithm>
#include <type_traits>

#include "philox.h"

#ifdef PK_NATIVE
// GCC 12 warns of the deliberately undefined operands inside its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace pk {
namespace {

template <typename T>
PK_INLINE void widen_rows(
    const T* from, int64_t stride, int64_t count, int64_t columns, int64_t padded, int64_t words,
    const uint32_t* keep, float* to) {
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t filled = i < count && (!keep || keep[i]) ? columns : 0;
    for (int64_t j = 0; j < filled; ++j) to[i * words + j] = to_float(from[i * stride + j]);
    for (int64_t j = filled; j < words; ++j) to[i * words + j] = 0.0f;
  }
}

PK_CLONES void widen_floats(
    const float* from, int64_t stride, int64_t count, int64_t columns, int64_t padded, int64_t words,
    const uint32_t* keep, float* to) {
  widen_rows(from, stride, count, columns, padded, words, keep, to);
}

PK_CLONES void widen_bfloat16(
    const bfloat16* from, int64_t stride, int64_t count, int64_t columns, int64_t padded,
    int64_t words, const uint32_t* keep, float* to) {
  widen_rows(from, stride, count, columns, padded, words, keep, to);
}

PK_CLONES void round_tile(float* tile, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j)
      tile[i * kDepth + j] = rounded<bfloat16>(tile[i * kDepth + j]);
}

// Rows 2 i and 2 i + 1 of `words` pairs side by side: word (i, j) is column j of both.
PK_CLONES void interleave(const bfloat16* even, const bfloat16* odd, int64_t columns, uint32_t* to) {
  for (int64_t j = 0; j < columns; ++j)
    to[j] = static_cast<uint32_t>(even[j].bits) | static_cast<uint32_t>(odd[j].bits) << 16;
}

}  // namespace

PK_CLONES void transpose_to_panels(const float* rows, int64_t count, int64_t words, float* panels) {
  constexpr int64_t kSide = 8;
  for (int64_t i = 0; i < count; i += kSide) {
    const float* from = rows + i * words;
    float* to = panels + i / kPanel * words * kPanel + i % kPanel;
    for (int64_t r = 0; r < words; ++r)
      for (int64_t k = 0; k < kSide; ++k) to[r * kPanel + k] = from[k * words + r];
  }
}

template <typename T>
void SingleWords<T>::stage(
    const T* from, int64_t stride, int64_t count, int64_t columns, int64_t padded, int64_t words,
    const uint32_t* keep, float* to) {
  if constexpr (std::is_same_v<T, float>) {
    widen_floats(from, stride, count, columns, padded, words, keep, to);
  } else {
    widen_bfloat16(from, stride, count, columns, padded, words, keep, to);
  }
}

template <typename T>
void SingleWords<T>::to_panels(const float* rows, int64_t padded, int64_t words, float* panels) {
  for (int64_t j = 0; j < words; j += kPanel)
    for (int64_t i = 0; i < padded; ++i)
      std::memcpy(
          panels + j * padded + i * kPanel, rows + i * words + j,
          std::min(kPanel, words - j) * sizeof(float));
}

template <typename T>
Narrowed SingleWords<T>::narrow(
    float* tile, int64_t rows, int64_t width, float* /*plain*/, float* /*transposed*/) {
  if constexpr (std::is_same_v<T, bfloat16>) round_tile(tile, rows, width);
  return {tile, kDepth, tile, kDepth};
}

template struct SingleWords<float>;
template struct SingleWords<bfloat16>;

#ifdef PK_NATIVE
void PairWords::stage(
    const bfloat16* from, int64_t stride, int64_t count, int64_t columns, int64_t padded,
    int64_t words, const uint32_t* keep, float* to) {
  auto* rows = reinterpret_cast<char*>(to);
  const int64_t row_bytes = words * static_cast<int64_t>(sizeof(float));
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t filled = i < count && (!keep || keep[i]) ? columns * 2 : 0;
    if (filled) std::memcpy(rows + i * row_bytes, from + i * stride, filled);
    std::memset(rows + i * row_bytes + filled, 0, row_bytes - filled);
  }
}

void PairWords::to_panels(const float* rows, int64_t padded, int64_t words, float* panels) {
  const auto* from = reinterpret_cast<const bfloat16*>(rows);
  auto* to = reinterpret_cast<uint32_t*>(panels);
  const int64_t columns = 2 * words, depth = padded / 2;
  for (int64_t j = 0; j < columns; j += kPanel)
    for (int64_t i = 0; i < depth; ++i) {
      const bfloat16* even = from + 2 * i * columns + j;
      interleave(
          even, even + columns, std::min(kPanel, columns - j), to + j * depth + i * kPanel);
    }
}

PK_NATIVE Narrowed PairWords::narrow(
    float* tile, int64_t rows, int64_t width, float* plain, float* transposed) {
  auto* rounded = reinterpret_cast<bfloat16*>(plain);
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < width; j += kLanes) {
      const float* from = tile + i * kDepth + j;
      const __m256i even = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from));
      const __m256i odd = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + kDepth));
      if (plain) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + i * kDepth + j), even);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + (i + 1) * kDepth + j), odd);
      }
      if (transposed) {
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
        _mm512_storeu_si512(
            transposed + i / 2 * kDepth + j, _mm512_or_si512(high, _mm512_cvtepu16_epi32(even)));
      }
    }
  return {plain, kDepth / 2, transposed, kDepth};
}
#endif

}  // namespace pk
