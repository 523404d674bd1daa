// y = keep * x * factor, row by row; see dropout.h.
#include "dropout.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "philox.h"

namespace pk {
namespace {

constexpr int64_t kRowsAtATime = 8;  // what is handed to a thread at least

template <typename T>
void drop_rows(const Drop& c, int64_t begin, int64_t end) {
  const Dropout dropout{true, c.seed, c.threshold};
  uint32_t keep[kDepth];
  for (int64_t row = begin; row < end; ++row) {
    const T* from = static_cast<const T*>(c.x.data) + row * c.x.stride;
    T* to = static_cast<T*>(c.y) + row * c.columns;
    for (int64_t k = 0; k < c.columns; k += kDepth) {
      draw_keep(dropout, {row, 1, nullptr}, c.columns, k, keep);
      const int64_t depth = std::min(kDepth, c.columns - k);
      for (int64_t i = 0; i < depth; ++i)
        from_float(keep[i] ? to_float(from[k + i]) * c.factor : 0.0f, to + k + i);
    }
  }
}

}  // namespace

void drop(const Drop& call) {
  auto* rows = call.type == Type::kBFloat16 ? drop_rows<bfloat16> : drop_rows<float>;
  torch::stable::parallel_for(
      0, call.rows, kRowsAtATime, [&](int64_t begin, int64_t end) { rows(call, begin, end); });
}

}  // namespace pk
