#include "prefix_products.h"

#include <algorithm>

#ifdef PK_NATIVE
// GCC 12 warns of the deliberately undefined operands inside its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace pk {
namespace {

// Additions in a row: longer chains of float32 lose more. A library sums the products of a single row
// in parallel lanes, which loses less still, and few rows cost little.
constexpr int64_t kChain = 32, kChainOfFewRows = 8;

// R rows and C vectors of one panel.
template <int R, int C, bool kTransposed>
PK_INLINE void tile(const Product& product, const float* a, const float* b, float* c) {
  const int64_t row = kTransposed ? 1 : product.a_row, step = kTransposed ? product.a_step : 1;
  const int64_t chain = product.rows <= kRowStep ? kChainOfFewRows : kChain;
  for (int64_t first = 0; first < product.depth; first += chain) {
    vf acc[R][C] = {};
    const int64_t last = std::min(product.depth, first + chain);
    for (int64_t r = first; r < last; ++r) {
      vf factors[C];
      PK_UNROLL for (int j = 0; j < C; ++j) factors[j] = load(b + r * kPanel + j * kLanes);
      PK_UNROLL for (int i = 0; i < R; ++i) {
        const float value = a[i * row + r * step];
        PK_UNROLL for (int j = 0; j < C; ++j) acc[i][j] += value * factors[j];
      }
    }
    const bool fresh = product.fresh && first == 0;
    PK_UNROLL for (int i = 0; i < R; ++i)
      PK_UNROLL for (int j = 0; j < C; ++j) {
        float* to = c + i * product.c_stride + j * kLanes;
        store(to, fresh ? acc[i][j] : load(to) + acc[i][j]);
      }
  }
}

template <int R, int C, bool kTransposed>
PK_INLINE void panels(const Product& product) {
  const int64_t row = kTransposed ? 1 : product.a_row;
  for (int64_t j = 0; j < product.columns; j += kPanel) {
    const float* b = product.b + j / kPanel * product.b_panel;
    const bool half = product.columns - j < kPanel;
    for (int64_t i = 0; i < product.rows; i += R) {
      const float* a = product.a + i * row;
      float* c = product.c + i * product.c_stride + j;
      for (int64_t k = 0; k < (half ? kLanes : kPanel); k += C * kLanes) {
        if (half) {
          tile<R, 1, kTransposed>(product, a, b + k, c + k);
        } else {
          tile<R, C, kTransposed>(product, a, b + k, c + k);
        }
      }
    }
  }
}

// Sixteen accumulators where there are 32 registers of sixteen lanes, four where there are fewer.
PK_CLONES void multiply_portable(const Product& product) {
  if (product.a_step == 1) {
    panels<4, 1, false>(product);
  } else {
    panels<4, 1, true>(product);
  }
}

#ifdef PK_AVX512
PK_AVX512 void multiply_avx512(const Product& product) {
  if (product.a_step == 1) {
    panels<8, 2, false>(product);
  } else {
    panels<8, 2, true>(product);
  }
}
#endif

}  // namespace

void multiply(const Product& product) {
#ifdef PK_AVX512
  if (native_avx512()) return multiply_avx512(product);
#endif
  multiply_portable(product);
}

#ifdef PK_NATIVE
#define PK_NATIVE_INLINE PK_NATIVE inline __attribute__((always_inline))

namespace {

template <int R, int C, bool kTransposed>
PK_NATIVE_INLINE void pair_tile(const Product& product, const float* a, const float* b, float* c) {
  const int64_t row = kTransposed ? 1 : product.a_row, step = kTransposed ? product.a_step : 1;
  __m512 acc[R][C] = {};
  for (int64_t r = 0; r < product.depth; ++r) {
    __m512bh factors[C];
    PK_UNROLL for (int j = 0; j < C; ++j)
      factors[j] = (__m512bh)_mm512_loadu_ps(b + r * kPanel + j * kLanes);
    PK_UNROLL for (int i = 0; i < R; ++i) {
      int bits;
      std::memcpy(&bits, a + i * row + r * step, sizeof(bits));
      const __m512bh value = (__m512bh)_mm512_set1_epi32(bits);
      PK_UNROLL for (int j = 0; j < C; ++j)
        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], value, factors[j]);
    }
  }
  PK_UNROLL for (int i = 0; i < R; ++i)
    PK_UNROLL for (int j = 0; j < C; ++j) {
      float* to = c + i * product.c_stride + j * kLanes;
      const __m512 sum =
          product.fresh ? acc[i][j] : _mm512_add_ps(_mm512_loadu_ps(to), acc[i][j]);
      _mm512_storeu_ps(to, sum);
    }
}

template <bool kTransposed>
PK_NATIVE_INLINE void pair_panels(const Product& product) {
  const int64_t row = kTransposed ? 1 : product.a_row;
  for (int64_t j = 0; j < product.columns; j += kPanel) {
    const float* b = product.b + j / kPanel * product.b_panel;
    for (int64_t i = 0; i < product.rows; i += kRowStep) {
      const float* a = product.a + i * row;
      float* c = product.c + i * product.c_stride + j;
      if (product.columns - j < kPanel) {
        pair_tile<kRowStep, 1, kTransposed>(product, a, b, c);
      } else {
        pair_tile<kRowStep, 2, kTransposed>(product, a, b, c);
      }
    }
  }
}

}  // namespace

PK_NATIVE void multiply_pairs(const Product& product) {
  if (product.a_step == 1) {
    pair_panels<false>(product);
  } else {
    pair_panels<true>(product);
  }
}
#endif

}  // namespace pk
