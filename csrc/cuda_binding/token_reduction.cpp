// Gradients of small factors as a torch op; see csrc/cuda/token_reduction.h.
#include "cuda/token_reduction.h"

#include "binding.h"

namespace {

using namespace pk::binding;

// A product [.., columns, rank] of any strides, or none.
pk::Output product_of(const OptionalTensor& out) {
  if (!out) return {};
  const int64_t dims = out->dim();
  return {out->data_ptr(), type_of(*out), out->stride(dims - 2), out->stride(dims - 1)};
}

pk::Output sums_of(const OptionalTensor& out) {
  if (!out) return {};
  return {out->data_ptr(), type_of(*out), 1, 0};
}

float* floats_of(const OptionalTensor& tensor) { return static_cast<float*>(data_of(tensor)); }
const int64_t* indices_of(const OptionalTensor& tensor) {
  return static_cast<const int64_t*>(data_of(tensor));
}

int64_t token_reduction(
    Tensor v0, Tensor low0, OptionalTensor out0, OptionalTensor lowsum, Tensor v1, Tensor low1,
    OptionalTensor out1, OptionalTensor colsum, OptionalTensor seed, int64_t threshold,
    int64_t dropped, int64_t splits, OptionalTensor parts, Tensor counters, OptionalTensor order,
    OptionalTensor offsets, bool scaled, OptionalTensor scale_at, double scale, double inverse_keep,
    OptionalTensor weight, OptionalTensor bias, OptionalTensor scale_gradient,
    OptionalTensor scale_parts) {
  const pk::TokenReduction call{
      .type = type_of(v0),
      .tokens = low0.size(0),
      .rank = low0.size(1),
      .first = {
          v0.data_ptr(), v0.stride(0), v0.size(1), low0.data_ptr(), product_of(out0),
          sums_of(lowsum)},
      .second = {
          v1.data_ptr(), v1.stride(0), v1.size(1), low1.data_ptr(), product_of(out1),
          sums_of(colsum)},
      .dropout = {indices_of(seed), static_cast<uint32_t>(threshold)},
      .dropped = dropped,
      .scaling = {
          .active = scaled,
          .scale_at = floats_of(scale_at),
          .per_column = scale_at && scale_at->numel() > 1,
          .scale = static_cast<float>(scale),
          .inverse_keep = static_cast<float>(inverse_keep),
          .gradient = floats_of(scale_gradient),
          .parts = floats_of(scale_parts),
          .weight = data_of(weight),
          .bias = data_of(bias),
      },
      .splits = splits,
      .parts = floats_of(parts),
      .counters = static_cast<int*>(counters.data_ptr()),
      .order = indices_of(order),
      .offsets = indices_of(offsets),
      .groups = offsets ? offsets->size(0) - 1 : 0,
  };
  return run(v0, [&](pk::device::Stream stream) { return pk::token_reduction(call, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels_cuda, m) {
  m.def(
      "token_reduction(Tensor v0, Tensor low0, Tensor(a!)? out0, Tensor(b!)? lowsum, Tensor v1, "
      "Tensor low1, Tensor(c!)? out1, Tensor(d!)? colsum, Tensor? seed, int threshold, "
      "int dropped, int splits, Tensor(e!)? parts, Tensor(f!) counters, Tensor? order, "
      "Tensor? offsets, bool scaled, Tensor? scale_at, float scale, float inverse_keep, "
      "Tensor? weight, Tensor? bias, Tensor(g!)? scale_gradient, Tensor(h!)? scale_parts) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_cuda, PK_DISPATCH_KEY, m) {
  m.impl("token_reduction", TORCH_BOX(&token_reduction));
}
