// The low-rank part of a LoRA layer on the CPU; the base product is the GEMM library's.
#pragma once

#include <cstdint>

namespace pk {

enum class Type : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// A matrix of `Type` elements with unit inner stride; strides are in elements.
struct Matrix {
  void* data;
  int64_t stride;
};

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
  void* da;             // [rank, in_features] or null
  void* db;             // [out_features, rank] or null
  void* dbias;          // [out_features] or null
  Type da_type, db_type, dbias_type;
};

void lora_forward(const LoRAForward& call);
void lora_backward(const LoRABackward& call);

}  // namespace pk
