// Prefix attention as torch ops; see csrc/cuda/prefix.h.
#include "cuda/prefix.h"

#include "binding.h"

namespace {

using namespace pk::binding;

// [batch, heads, rows, head size]; one sample stands for all of the batch.
pk::Heads heads_of(const Tensor& x) {
  const auto bytes = static_cast<int64_t>(x.element_size());
  bool aligned = pk::is_aligned(x.data_ptr(), 16);
  for (int dim = 0; dim < 3; ++dim)
    aligned = aligned && (x.size(dim) == 1 || x.stride(dim) * bytes % 16 == 0);
  return {x.data_ptr(), x.size(0) == 1 ? 0 : x.stride(0), x.stride(1), x.stride(2), aligned};
}

float* floats_of(const OptionalTensor& tensor) { return static_cast<float*>(data_of(tensor)); }

pk::PrefixCall call_of(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
    const Tensor& prefix_value, const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens,
    const OptionalTensor& gate, const OptionalTensor& seed, bool causal, double scale,
    int64_t window, int64_t threshold, double inverse_keep, const Tensor& out, const Tensor& lse,
    const OptionalTensor& prefix_lse) {
  return {
      .type = type_of(query),
      .batch = query.size(0),
      .heads = query.size(1),
      .kv_heads = key.size(1),
      .queries = query.size(2),
      .keys = key.size(2),
      .prefix = prefix_key.size(2),
      .head_size = query.size(3),
      .query = heads_of(query),
      .key = heads_of(key),
      .value = heads_of(value),
      .prefix_key = heads_of(prefix_key),
      .prefix_value = heads_of(prefix_value),
      .shared = prefix_key.size(0) == 1,
      .key_mask = static_cast<const uint8_t*>(data_of(key_mask)),
      .segments = static_cast<const int32_t*>(data_of(cu_seqlens)),
      .segment_count = cu_seqlens ? cu_seqlens->size(0) - 1 : 0,
      .gate = floats_of(gate),
      .dropout = {static_cast<const int64_t*>(data_of(seed)), static_cast<uint32_t>(threshold)},
      .inverse_keep = static_cast<float>(inverse_keep),
      .causal = causal,
      .window = window,
      .scale = static_cast<float>(scale),
      .lse = floats_of(lse),
      .prefix_lse = floats_of(prefix_lse),
      .out = out.data_ptr(),
  };
}

int64_t prefix_forward(
    Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value,
    OptionalTensor key_mask, OptionalTensor cu_seqlens, OptionalTensor gate, OptionalTensor seed,
    bool causal, double scale, int64_t window, int64_t threshold, double inverse_keep, Tensor out,
    Tensor lse, OptionalTensor prefix_lse) {
  const pk::PrefixCall call = call_of(
      query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed, causal, scale,
      window, threshold, inverse_keep, out, lse, prefix_lse);
  return run(query, [&](pk::device::Stream stream) { return pk::prefix_forward(call, stream); });
}

// numbers: [2, or gated 4, batch, heads, queries], for the launches to hand on.
int64_t prefix_backward(
    Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value,
    OptionalTensor key_mask, OptionalTensor cu_seqlens, OptionalTensor gate, OptionalTensor seed,
    bool causal, double scale, int64_t window, int64_t threshold, double inverse_keep, Tensor out,
    Tensor lse, OptionalTensor prefix_lse, Tensor dout, OptionalTensor dlse, Tensor numbers,
    int64_t splits, OptionalTensor parts, OptionalTensor dquery, OptionalTensor dkey,
    OptionalTensor dvalue, OptionalTensor dprefix_key, OptionalTensor dprefix_value,
    OptionalTensor dgate) {
  const pk::PrefixCall call = call_of(
      query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed, causal, scale,
      window, threshold, inverse_keep, out, lse, prefix_lse);
  float* of_rows = floats_of(numbers);
  const auto row_count = lse.numel();
  const pk::PrefixGradients gradients{
      .d_out = heads_of(dout),
      .d_lse = floats_of(dlse),
      .d_query = data_of(dquery),
      .d_key = data_of(dkey),
      .d_value = data_of(dvalue),
      .d_prefix_key = data_of(dprefix_key),
      .d_prefix_value = data_of(dprefix_value),
      .d_prefix_key_type = dprefix_key ? type_of(*dprefix_key) : call.type,
      .d_prefix_value_type = dprefix_value ? type_of(*dprefix_value) : call.type,
      .d_gate = floats_of(dgate),
      .delta = of_rows,
      .correction = of_rows + row_count,
      .prefix_delta = gate ? of_rows + 2 * row_count : nullptr,
      .prefix_correction = gate ? of_rows + 3 * row_count : nullptr,
      .splits = splits,
      .parts = floats_of(parts),
  };
  return run(query, [&](pk::device::Stream stream) {
    return pk::prefix_backward(call, gradients, stream);
  });
}

#define PK_PREFIX_CALL                                                                         \
  "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "           \
  "Tensor? key_mask, Tensor? cu_seqlens, Tensor? gate, Tensor? seed, bool causal, "            \
  "float scale, int window, int threshold, float inverse_keep, "

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels_cuda, m) {
  m.def(
      "prefix_forward(" PK_PREFIX_CALL
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? prefix_lse) -> int");
  m.def(
      "prefix_backward(" PK_PREFIX_CALL
      "Tensor out, Tensor lse, Tensor? prefix_lse, Tensor dout, Tensor? dlse, Tensor(a!) numbers, "
      "int splits, Tensor(b!)? parts, Tensor(c!)? dquery, Tensor(d!)? dkey, Tensor(e!)? dvalue, "
      "Tensor(f!)? dprefix_key, Tensor(g!)? dprefix_value, Tensor(h!)? dgate) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_cuda, PK_DISPATCH_KEY, m) {
  m.impl("prefix_forward", TORCH_BOX(&prefix_forward));
  m.impl("prefix_backward", TORCH_BOX(&prefix_backward));
}
