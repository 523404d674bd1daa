// Gradients of small factors on the GPU: sums over all tokens, split, bitwise repeatable.
//
//     g0 = v0^T l0  [C0, R]      lowsum = sum_m l0  [R]
//     g1 = v1^T l1  [C1, R]      colsum = sum_m v1  [C1]
//
// peft_kernels/core/token_reduction.py says the same for Triton: one of v0 and v1 may be under
// dropout; g1 and colsum may be scaled, and give the gradient of that scale; rows may come in
// groups with sums of their own.
#pragma once

#include "philox.h"
#include "types.h"

namespace pk {

struct Output {
  void* data;  // null: not wanted
  Type type;
  int64_t stride_c, stride_r;
};

struct ReductionSide {
  const void* v;  // [tokens, columns], unit inner stride
  int64_t v_stride, columns;
  const void* low;  // [tokens, rank], contiguous
  Output out;       // [columns, rank]
  Output sums;      // of the first side: of low, [rank]; of the second: of v, [columns]
};

struct ReductionScaling {
  bool active;             // false: no scaling, and no gradient of it
  const float* scale_at;   // on the device, or null: then `scale`
  bool per_column;         // scale_at has one for each column
  float scale, inverse_keep;
  float* gradient;         // one, or one per column; null: not wanted
  float* parts;            // rank blocks * columns, where the gradient is wanted
  const void* weight;      // [columns, rank], contiguous
  const void* bias;        // [columns] or null
};

struct TokenReduction {
  Type type;
  int64_t tokens, rank;
  ReductionSide first, second;
  Dropout dropout;
  int64_t dropped;          // which side's v dropout acts on: 0, 1
  ReductionScaling scaling; // of the second side
  int64_t splits;           // parts that the tokens are summed in
  float* parts;             // splits * ((C0 + C1) R + C1 + R), where there are several
  int* counters;            // one per tile of 64 columns and 64 ranks, and one: zero, and zero again
  const int64_t* order;     // rows, one group after the other; null: no groups
  const int64_t* offsets;   // [groups + 1]
  int64_t groups;
};

// 0 or a CUDA error; device::last_error() has the text.
int token_reduction(const TokenReduction& call, device::Stream stream);

}  // namespace pk
