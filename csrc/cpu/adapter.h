// The bottleneck adapter on the CPU: y = residual + scale * drop(act(x down^T + b) up^T + b).
#pragma once

#include "activation.h"
#include "tensors.h"

namespace pk {

// What both directions take. scale is `channels` (float32 [features]) where that is not null.
struct AdapterCall {
  Type type;
  int64_t tokens, features, rank;
  Matrix x;              // [tokens, features]
  const void* down;      // [rank, features], contiguous
  const void* up;        // [features, rank], contiguous
  const void* up_bias;   // [features] or null
  float scale;
  const float* channels;
  Activation activation;
  bool dropout;
  uint64_t seed;
  uint32_t threshold;
  float keep_scale;      // 1 / (1 - p)
  void* pre;             // [tokens, rank], contiguous: x down^T + down_bias, made by forward
  // Many adapters: the one of every row [tokens], none where it is not below `adapters`. The parameters
  // and their gradients then have the adapter first; scale is one number. Null with one adapter.
  const int64_t* index;
  int64_t adapters;
};

struct AdapterForward : AdapterCall {
  const void* down_bias;  // [rank] or null
  Matrix residual;        // [tokens, features], or null data
  void* y;                // [tokens, features], contiguous
};

struct AdapterBackward : AdapterCall {
  Matrix dy;               // [tokens, features]
  bool input_residual;     // x itself is the residual: dx takes dy
  void* dx;                // [tokens, features], contiguous, or null
  Gradient d_down;         // [rank, features]
  Gradient d_up;           // [features, rank]
  Gradient d_down_bias;    // [rank]
  Gradient d_up_bias;      // [features]
  float* d_scale;          // [features] where scale is per channel, else [1]; or null
};

void adapter_forward(const AdapterForward& call);
void adapter_backward(const AdapterBackward& call);

}  // namespace pk
