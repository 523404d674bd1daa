// Attention over a learned prefix and a sequence, and its gradients, on the CPU.
//
//   s[i, j] = scale q[i] k[j]     p = softmax over [prefix ; seen keys]     out = p v
//
// The prefix is seen by every query; sequence key j by query i iff j lies in the query's range (causal
// bottom-right, window, packed segment) and its key mask is set. Gated: a softmax of its own for each
// of the two, out = sequence + tanh(gate) prefix.
//
// A thread takes one key head and some of the queries. It packs a segment of keys once, then walks over
// blocks of rows, the rows of a block being queries of all heads that share the key head, and over
// blocks of keys that any row of the block sees: products on cache-resident tiles, nothing of size
// S x T, hidden blocks skipped, prefix and sequence read where they lie.
#pragma once

#include <cstdint>

#include "philox.h"
#include "tensors.h"

namespace pk {

// [batch, heads, rows, head size] with unit inner stride; strides are in elements, 0 where shared.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

// What both directions take.
struct PrefixCall {
  Type type;
  int64_t batch, heads, kv_heads, queries, keys, prefix, head_size;
  Heads query, key, value, prefix_key, prefix_value;
  bool shared;               // one prefix for the whole batch
  const uint8_t* key_mask;   // [batch, keys] contiguous, or null
  const int32_t* segments;   // cu_seqlens [segment_count + 1], or null
  int64_t segment_count;
  const float* gate;         // [heads], or null
  Dropout dropout;
  float keep_scale;          // 1 / (1 - p)
  bool causal;
  int64_t window;            // 0: none
  float scale;
  float* lse;                // [batch, heads, queries]
  float* prefix_lse;         // the same, gated only
  void* out;                 // [batch, heads, queries, head size]
  bool partial;              // backward: lse and out are over more keys than the call's
};

struct PrefixGradients {
  Heads d_out;
  const float* d_lse;        // [batch, heads, queries], or null
  void* d_query;             // null where not wanted, as all that follow
  void* d_key;
  void* d_value;
  Gradient d_prefix_key, d_prefix_value;  // [1 or batch, kv_heads, prefix, head size]
  float* d_gate;             // [heads]
};

void prefix_forward(const PrefixCall& call);

void prefix_backward(const PrefixCall& call, const PrefixGradients& gradients);

}  // namespace pk
