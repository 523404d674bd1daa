// How the gradients of prefix attention are split among items and put together again.
#pragma once

#include <memory>

#include "prefix_blocks.h"

namespace pk {

// An item is some samples (one where the prefix is not shared), a key head and a chunk of queries.
struct BackwardPlan {
  BackwardPlan(const PrefixCall& call, const PrefixGradients& to);

  int64_t items(const PrefixCall& call) const {
    return sample_chunks * call.kv_heads * query_chunks;
  }

  // Add the parts in order and write what the items left.
  void finish(const PrefixCall& call, const PrefixGradients& to) const;

  Ranges ranges;
  // Whether a pass of its own sums p and p d_out v first, so that p adds to one and delta is exact:
  // gated, where out holds two softmaxes, and where few keys leave lse's rounding unaveraged.
  bool weighs;
  int64_t queries, query_chunks;  // of an item; of a sample
  int64_t samples, sample_chunks;
  int64_t padded_prefix, padded_head;
  // Sums of chunks of queries [query_chunks, batch, kv_heads, keys, head size]; null where one chunk
  // writes the gradient itself.
  Buffer<float> d_key, d_value;
  // [sample_chunks * query_chunks (shared) or query_chunks * batch, kv_heads, padded prefix, padded head]
  Buffer<float> d_prefix_key, d_prefix_value;
  Buffer<float> dots;  // gated: d_out times the attention over the prefix, as lse
};

}  // namespace pk
