// The products of lowrank.h on bfloat16 as it is, by the dot product instruction of AVX512-BF16.
//
// One instruction multiplies pairs along the reduction and adds both to a float32 lane: twice the
// rate of float32, without widening. The factors are therefore packed in pairs of the reduction
// index, P and the tiles of Q as [reduction / 2][columns][2]; V and S are rows, whose pairs lie side
// by side.
#pragma once

#include "lowrank.h"
#include "vector_level.h"

namespace pk {

#ifdef PK_NATIVE
struct NativeBFloat16 {
  using Element = bfloat16;
  using Work = bfloat16;
  static constexpr int64_t kRows = 64;         // of a block in backward: fewer passes over G
  static constexpr int64_t kForwardRows = 32;  // in forward: enough blocks for every core

  static PK_INLINE int64_t at(int64_t i, int64_t j, int64_t stride) {
    return (i / 2 * stride + j) * 2 + i % 2;
  }
  static PK_INLINE bfloat16 work(bfloat16 value) { return value; }
  static PK_INLINE void store_rounded(bfloat16* to, vf v) { store(to, v); }

  PK_NATIVE static void stage(
      const bfloat16* x, int64_t stride, const Rows& rows, int64_t depth, bfloat16* v);
  PK_NATIVE static void apply_mask(const uint32_t* keep, int64_t rows, bfloat16* v);
  PK_NATIVE static void project(
      const bfloat16* v, const bfloat16* p, int64_t rows, int64_t depth, int64_t ranks, float* s);
  PK_NATIVE static void gradient(
      const bfloat16* v, const bfloat16* l, int64_t rows, int64_t depth, int64_t ranks, bool fresh,
      float* g);
  PK_NATIVE static void expand(
      const bfloat16* s, int64_t s_stride, const bfloat16* q, const Epilogue<bfloat16>& after,
      const Rows& rows, int64_t ranks, int64_t columns, bfloat16* y, int64_t y_stride);
};

// The sums of dots.h.
template <int R>
PK_NATIVE void dots(
    const bfloat16* v, int64_t v_stride, const bfloat16* w, int64_t count, int64_t rows, float* line);
#endif

}  // namespace pk
