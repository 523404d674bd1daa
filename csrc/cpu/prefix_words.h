// How rows of a dtype become operands of prefix_products.h, and tiles of probabilities likewise.
//
// FloatWords computes float32, WideWords bfloat16 widened to it (values that eager PyTorch rounds to
// bfloat16 are rounded here too), PairWords bfloat16 as it is, by the instruction of AVX512-BF16.
#pragma once

#include <cstdint>

#include "prefix_products.h"
#include "vec.h"

namespace pk {

// A tile [rows, kDepth] as operand A, plain and transposed.
struct Narrowed {
  const float* plain;
  int64_t plain_row;
  const float* transposed;
  int64_t transposed_step;
};

// [rows, words] of float become [panel][words][kPanel]: rows are the columns of the operand.
void transpose_to_panels(const float* rows, int64_t count, int64_t words, float* panels);

template <typename T>
struct SingleWords {
  using Element = T;
  static constexpr int64_t kPair = 1;

  static void multiply(const Product& product) { pk::multiply(product); }

  // to[padded, words] = from[count, columns], zero beyond; rows whose keep is zero become zero.
  static void stage(
      const T* from, int64_t stride, int64_t count, int64_t columns, int64_t padded, int64_t words,
      const uint32_t* keep, float* to);

  // Staged rows become [panel][padded / kPair][kPanel]: rows are the reduction.
  static void to_panels(const float* rows, int64_t padded, int64_t words, float* panels);

  static Narrowed narrow(float* tile, int64_t rows, int64_t width, float* plain, float* transposed);
};

using FloatWords = SingleWords<float>;
using WideWords = SingleWords<bfloat16>;

#ifdef PK_NATIVE
struct PairWords {
  using Element = bfloat16;
  static constexpr int64_t kPair = 2;

  static void multiply(const Product& product) { multiply_pairs(product); }
  static void stage(
      const bfloat16* from, int64_t stride, int64_t count, int64_t columns, int64_t padded,
      int64_t words, const uint32_t* keep, float* to);
  static void to_panels(const float* rows, int64_t padded, int64_t words, float* panels);
  PK_NATIVE static Narrowed narrow(
      float* tile, int64_t rows, int64_t width, float* plain, float* transposed);
};
#endif

}  // namespace pk
