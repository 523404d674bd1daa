// The low-rank part of a LoRA layer on the CPU; the base product is the GEMM library's.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace pk {

struct LoRAForward {
  Type type;
  int64_t tokens, in_features, out_features, rank;
  Matrix x;             // [tokens, in_features]
  const void* lora_a;   // [rank, in_features], contiguous
  const void* lora_b;   // [out_features, rank], contiguous
  const void* bias;     // [out_features] or null
  const void* weight;   // null, or row-major [out_features, in_features]: then y is complete
  float factor;         // scale / (1 - p)
  bool dropout;
  uint64_t seed;
  uint32_t threshold;
  void* y;              // [tokens, out_features], contiguous: += bias + s B^T; with a weight: all of y
  void* s;              // [tokens, rank], contiguous: factor * (mask * x) A^T
};

struct LoRABackward {
  Type type;
  int64_t tokens, in_features, out_features, rank;
  Matrix dy;            // [tokens, out_features]
  Matrix x;             // [tokens, in_features]
  const void* s;        // [tokens, rank], contiguous
  const void* lora_a;
  const void* lora_b;
  const void* weight;   // null, or row-major [out_features, in_features]: then dx is complete
  float factor;
  bool dropout;
  uint64_t seed;
  uint32_t threshold;
  void* dx;             // [tokens, in_features] or null: += mask * (ds A); with a weight: all of dx
  Gradient da;          // [rank, in_features]
  Gradient db;          // [out_features, rank]
  Gradient dbias;       // [out_features]
};

void lora_forward(const LoRAForward& call);
void lora_backward(const LoRABackward& call);

}  // namespace pk
