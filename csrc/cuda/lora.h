// The products of LoRA on the GPU, forward and backward; see lora_kernel.h.
#pragma once

#include "philox.h"
#include "types.h"

namespace pk {

// A matrix [rows, columns]; `along` where its unit stride is along the columns, else along the
// rows.
struct Strided {
  const void* data;
  int64_t stride;  // the other one, in elements
};

// y = x w^T + bias + keep * (s b^T),  s = factor * (keep * x) a^T;  keep acts on one of the two.
// Forward: W, A, B. Backward: x is dY, w is W^T, a is B^T, b is A^T, s is dS, y is dX.
struct LoRAProduct {
  Type type;
  int64_t tokens, depth, columns, rank;
  Strided x;  // [tokens, depth], unit stride along the depth
  bool along;
  Strided w;  // [columns, depth], unit stride along the depth if `along`, else along the columns
  Strided a;  // [rank, depth], likewise
  Strided b;  // [columns, rank], likewise
  const void* bias;          // [columns] or null
  const float* scale_at;     // on the device, or null
  float scale, inverse_keep; // factor is *scale_at or scale, times inverse_keep
  Dropout dropout;           // its seed null: keep is one everywhere
  bool drops_output;         // keep acts on s b^T, not on x
  void* y;                   // [tokens, columns], contiguous; null: s alone
  void* s;                   // [tokens, rank], contiguous
  int* counters;             // 2 + ceil(tokens / 64) zeros, and zeros again afterwards
  int64_t multiprocessors;
};

// 0 or a CUDA error; device::last_error() has the text.
int lora_product(const LoRAProduct& call, device::Stream stream);

}  // namespace pk
