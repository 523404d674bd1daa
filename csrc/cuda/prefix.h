// Attention over a learned prefix and a sequence, and its gradients, on the GPU.
//
//   s[i, j] = scale q[i] k[j]     p = softmax over [prefix ; seen keys]     out = p v
//
// The prefix is seen by every query; sequence key j by query i iff j lies in the query's interval
// (causal bottom-right, window, packed segment) and its key mask is set. Gated: a softmax of its
// own for each of the two, out = sequence + tanh(gate) prefix.
#pragma once

#include "philox.h"
#include "types.h"

namespace pk {

// [batch, heads, rows, head size] with unit inner stride; strides are in elements, 0 where shared.
struct Heads {
  const void* data;
  int64_t batch, head, row;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

// What both directions take.
struct PrefixCall {
  Type type;
  int64_t batch, heads, kv_heads, queries, keys, prefix, head_size;
  Heads query, key, value, prefix_key, prefix_value;
  bool shared;              // one prefix for the whole batch
  const uint8_t* key_mask;  // [batch, keys] contiguous, or null
  const int32_t* segments;  // cu_seqlens [segment_count + 1], or null
  int64_t segment_count;
  const float* gate;        // [heads], or null
  Dropout dropout;
  float inverse_keep;       // 1 / (1 - p)
  bool causal;
  int64_t window;           // 0: none; at most queries + keys
  float scale;
  float* lse;               // [batch, heads, queries]
  float* prefix_lse;        // the same, gated only
  void* out;                // [batch, heads, queries, head size]
};

struct PrefixGradients {
  Heads d_out;
  const float* d_lse;  // [batch, heads, queries], or null
  void* d_query;       // null where not wanted, as all that follow
  void* d_key;
  void* d_value;
  void* d_prefix_key;  // [1 or batch, kv_heads, prefix, head size]
  void* d_prefix_value;
  Type d_prefix_key_type, d_prefix_value_type;
  float* d_gate;       // [heads]
  // Written by the first launch for the others, each [batch, heads, queries]: Σ p dp of the softmax
  // over the sequence, or over both; what makes its Σ p one; the same of the gated prefix.
  float *delta, *correction, *prefix_delta, *prefix_correction;
  int64_t splits;      // parts that the rows are summed in for the prefix's gradients
  float* parts;        // splits times the prefix's gradients, twice, where there are several
};

// 0 or a CUDA error; device::last_error() has the text.
int prefix_forward(const PrefixCall& call, device::Stream stream);
int prefix_backward(
    const PrefixCall& call, const PrefixGradients& gradients, device::Stream stream);

// The launches of prefix_backward.
int prefix_query_gradient(
    const PrefixCall& call, const PrefixGradients& gradients, device::Stream stream);
int prefix_key_gradient(
    const PrefixCall& call, const PrefixGradients& gradients, bool of_prefix,
    device::Stream stream);

}  // namespace pk
