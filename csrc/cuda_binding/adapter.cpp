// The bottleneck adapter as torch ops; see csrc/cuda/adapter.h.
#include "cuda/adapter.h"

#include "binding.h"

namespace {

using namespace pk::binding;

pk::RowGroups groups_of(
    const OptionalTensor& order, const OptionalTensor& offsets, const OptionalTensor& tiles) {
  return {
      static_cast<const int64_t*>(data_of(order)),
      static_cast<const int64_t*>(data_of(offsets)),
      static_cast<const int64_t*>(data_of(tiles)),
      tiles ? tiles->size(0) : 0,
  };
}

pk::Dropout dropout_of(const OptionalTensor& seed, int64_t threshold) {
  return {static_cast<const int64_t*>(data_of(seed)), static_cast<uint32_t>(threshold)};
}

int64_t adapter_forward(
    Tensor x, Tensor down, Tensor up, OptionalTensor down_bias, OptionalTensor up_bias,
    OptionalTensor residual, OptionalTensor scale_at, double scale, double inverse_keep,
    int64_t activation, OptionalTensor seed, int64_t threshold, OptionalTensor order,
    OptionalTensor offsets, OptionalTensor tiles, int64_t tile_rows, Tensor y, Tensor pre,
    Tensor hidden) {
  const pk::AdapterPass call{
      .type = type_of(x),
      .backward = false,
      .tokens = x.size(0),
      .features = x.size(1),
      .bottleneck = pre.size(1),
      .tile_rows = tile_rows,
      .v = x.data_ptr(),
      .v_stride = x.stride(0),
      .inner = down.data_ptr(),
      .outer = up.data_ptr(),
      .inner_bias = data_of(down_bias),
      .outer_bias = data_of(up_bias),
      .added = data_of(residual),
      .added_stride = residual ? residual->stride(0) : 0,
      .scale_at = static_cast<const float*>(data_of(scale_at)),
      .per_channel = scale_at && scale_at->numel() > 1,
      .scale = static_cast<float>(scale),
      .inverse_keep = static_cast<float>(inverse_keep),
      .activation = static_cast<pk::Activation>(activation),
      .dropout = dropout_of(seed, threshold),
      .pre = pre.data_ptr(),
      .low = hidden.data_ptr(),
      .hidden = nullptr,
      .out = y.data_ptr(),
      .groups = groups_of(order, offsets, tiles),
  };
  return run(x, [&](pk::device::Stream stream) { return pk::adapter_pass(call, stream); });
}

int64_t adapter_backward(
    Tensor dy, Tensor pre, Tensor down, Tensor up, OptionalTensor scale_at, double scale,
    double inverse_keep, int64_t activation, OptionalTensor seed, int64_t threshold,
    OptionalTensor order, OptionalTensor offsets, OptionalTensor tiles, int64_t tile_rows,
    bool input_residual, OptionalTensor dpre, OptionalTensor hidden, OptionalTensor dx) {
  const pk::AdapterPass call{
      .type = type_of(dy),
      .backward = true,
      .tokens = dy.size(0),
      .features = dy.size(1),
      .bottleneck = pre.size(1),
      .tile_rows = tile_rows,
      .v = dy.data_ptr(),
      .v_stride = dy.stride(0),
      .inner = up.data_ptr(),
      .outer = down.data_ptr(),
      .inner_bias = nullptr,
      .outer_bias = nullptr,
      .added = input_residual ? dy.data_ptr() : nullptr,
      .added_stride = dy.stride(0),
      .scale_at = static_cast<const float*>(data_of(scale_at)),
      .per_channel = scale_at && scale_at->numel() > 1,
      .scale = static_cast<float>(scale),
      .inverse_keep = static_cast<float>(inverse_keep),
      .activation = static_cast<pk::Activation>(activation),
      .dropout = dropout_of(seed, threshold),
      .pre = pre.data_ptr(),
      .low = data_of(dpre),
      .hidden = data_of(hidden),
      .out = data_of(dx),
      .groups = groups_of(order, offsets, tiles),
  };
  return run(dy, [&](pk::device::Stream stream) { return pk::adapter_pass(call, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels_cuda, m) {
  m.def(
      "adapter_forward(Tensor x, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, "
      "Tensor? residual, Tensor? scale_at, float scale, float inverse_keep, int activation, "
      "Tensor? seed, int threshold, Tensor? order, Tensor? offsets, Tensor? tiles, int tile_rows, "
      "Tensor(a!) y, Tensor(b!) pre, Tensor(c!) hidden) -> int");
  m.def(
      "adapter_backward(Tensor dy, Tensor pre, Tensor down, Tensor up, Tensor? scale_at, "
      "float scale, float inverse_keep, int activation, Tensor? seed, int threshold, "
      "Tensor? order, Tensor? offsets, Tensor? tiles, int tile_rows, bool input_residual, "
      "Tensor(a!)? dpre, Tensor(b!)? hidden, Tensor(c!)? dx) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_cuda, PK_DISPATCH_KEY, m) {
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward));
}
