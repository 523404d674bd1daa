// Prefix attention on raw pointers, for peft_kernels/prefix/cpp.py.
#include "prefix_binding.h"

#include "cpu/prefix.h"

namespace {

namespace py = pybind11;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

pk::Type type(bool bfloat16) { return bfloat16 ? pk::Type::kBFloat16 : pk::Type::kFloat32; }

pk::Heads heads(uintptr_t address, int64_t batch, int64_t head, int64_t row) {
  return {pointer(address), batch, head, row};
}

pk::PrefixCall call(
    bool bfloat16, int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
    int64_t prefix, int64_t head_size, const pk::Heads& query, const pk::Heads& key,
    const pk::Heads& value, const pk::Heads& prefix_key, const pk::Heads& prefix_value, bool shared,
    uintptr_t key_mask, uintptr_t segments, int64_t segment_count, uintptr_t gate, uintptr_t seed,
    uint32_t threshold, float keep_scale, bool causal, int64_t window, float scale, uintptr_t lse,
    uintptr_t prefix_lse, uintptr_t out, bool partial) {
  return {
      .type = type(bfloat16),
      .batch = batch,
      .heads = heads,
      .kv_heads = kv_heads,
      .queries = queries,
      .keys = keys,
      .prefix = prefix,
      .head_size = head_size,
      .query = query,
      .key = key,
      .value = value,
      .prefix_key = prefix_key,
      .prefix_value = prefix_value,
      .shared = shared,
      .key_mask = static_cast<const uint8_t*>(pointer(key_mask)),
      .segments = static_cast<const int32_t*>(pointer(segments)),
      .segment_count = segment_count,
      .gate = static_cast<const float*>(pointer(gate)),
      .dropout = {seed != 0, seed ? *static_cast<const uint64_t*>(pointer(seed)) : 0, threshold},
      .keep_scale = keep_scale,
      .causal = causal,
      .window = window,
      .scale = scale,
      .lse = static_cast<float*>(pointer(lse)),
      .prefix_lse = static_cast<float*>(pointer(prefix_lse)),
      .out = pointer(out),
      .partial = partial,
  };
}

void backward(
    const pk::PrefixCall& call, const pk::Heads& d_out, uintptr_t d_lse, uintptr_t d_query,
    uintptr_t d_key, uintptr_t d_value, uintptr_t d_prefix_key, bool d_prefix_key_bfloat16,
    uintptr_t d_prefix_value, bool d_prefix_value_bfloat16, uintptr_t d_gate) {
  py::gil_scoped_release release;
  pk::prefix_backward(call, pk::PrefixGradients{
      .d_out = d_out,
      .d_lse = static_cast<const float*>(pointer(d_lse)),
      .d_query = pointer(d_query),
      .d_key = pointer(d_key),
      .d_value = pointer(d_value),
      .d_prefix_key = {pointer(d_prefix_key), type(d_prefix_key_bfloat16)},
      .d_prefix_value = {pointer(d_prefix_value), type(d_prefix_value_bfloat16)},
      .d_gate = static_cast<float*>(pointer(d_gate)),
  });
}

}  // namespace

void bind_prefix(py::module_& m) {
  py::class_<pk::Heads>(m, "PrefixHeads", "A tensor of heads; see csrc/cpu/prefix.h.")
      .def(py::init(&heads));
  py::class_<pk::PrefixCall>(m, "PrefixCall", "What both directions take; see csrc/cpu/prefix.h.")
      .def(py::init(&call));
  m.def(
      "prefix_forward",
      [](const pk::PrefixCall& call) {
        py::gil_scoped_release release;
        pk::prefix_forward(call);
      },
      "prefix_attention on raw pointers; see csrc/cpu/prefix.h.");
  m.def("prefix_backward", &backward, "Its gradients on raw pointers; see csrc/cpu/prefix.h.");
}
