// The bottleneck adapter on the GPU, one or many, forward and backward; see adapter_kernel.h.
#pragma once

#include "adapter_activation.h"
#include "philox.h"
#include "types.h"

namespace pk {

// Rows sorted by adapter, those without one first; a tile has rows of one group alone.
struct RowGroups {
  const int64_t* order;    // [tokens], row numbers; null: one adapter for all rows
  const int64_t* offsets;  // [count + 1], where in `order` each group starts, and the last one ends
  const int64_t* tiles;    // [count], the first tile of each
  int64_t count;           // adapters + 1
};

// Forward: v is X, inner is W_down, outer W_up.
//     pre = v inner^T + inner_bias      low = act(pre)
//     out = added + c * keep * (low outer^T + outer_bias)
// Backward: v is dY, inner is W_up, outer W_down, added dY or nothing.
//     low = act'(pre) * ((c * keep * v) inner)      hidden = act(pre)      out = added + low outer
// c is the scale times inverse_keep. Parameters of many adapters have the adapter first.
struct AdapterPass {
  Type type;
  bool backward;
  int64_t tokens, features, bottleneck;
  int64_t tile_rows;                    // 16 or 64
  const void* v;                        // [tokens, features], unit inner stride
  int64_t v_stride;
  const void *inner, *outer;            // contiguous, as the layers have them
  const void *inner_bias, *outer_bias;  // [bottleneck], [features], or null
  const void* added;                    // [tokens, features], unit inner stride, or null
  int64_t added_stride;
  const float* scale_at;                // on the device, or null: then `scale`
  bool per_channel;                     // scale_at has one for each feature
  float scale, inverse_keep;
  Activation activation;
  Dropout dropout;                      // its seed null: keep is one everywhere
  void* pre;                            // [tokens, bottleneck]; backward reads it
  void* low;                            // likewise; backward: null where only `hidden` is wanted
  void* hidden;                         // likewise; null where it is not wanted
  void* out;                            // [tokens, features], contiguous; backward: or null
  RowGroups groups;
};

// 0 or a CUDA error; device::last_error() has the text.
int adapter_pass(const AdapterPass& call, device::Stream stream);

}  // namespace pk
