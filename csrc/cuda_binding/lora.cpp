// LoRA's products as a torch op; see csrc/cuda/lora.h.
#include "cuda/lora.h"

#include "binding.h"

namespace {

using namespace pk::binding;

// Whether the unit stride is along the columns; a size of one has any stride.
bool is_along(const Tensor& matrix) { return matrix.stride(1) == 1 || matrix.size(1) == 1; }

pk::Strided strided(const Tensor& matrix, bool along) {
  return {matrix.data_ptr(), matrix.stride(along ? 0 : 1)};
}

// w, a and b have their unit stride in the same dimension: Python sees to it.
int64_t lora_product(
    Tensor x, Tensor w, Tensor a, Tensor b, OptionalTensor bias, OptionalTensor scale_at,
    double scale, double inverse_keep, OptionalTensor seed, int64_t threshold, bool drops_output,
    int64_t multiprocessors, OptionalTensor y, Tensor s, Tensor counters) {
  const bool along = is_along(w);
  const pk::LoRAProduct call{
      .type = type_of(x),
      .tokens = x.size(0),
      .depth = x.size(1),
      .columns = w.size(0),
      .rank = a.size(0),
      .x = strided(x, true),
      .along = along,
      .w = strided(w, along),
      .a = strided(a, along),
      .b = strided(b, along),
      .bias = data_of(bias),
      .scale_at = static_cast<const float*>(data_of(scale_at)),
      .scale = static_cast<float>(scale),
      .inverse_keep = static_cast<float>(inverse_keep),
      .dropout = {static_cast<const int64_t*>(data_of(seed)), static_cast<uint32_t>(threshold)},
      .drops_output = drops_output,
      .y = data_of(y),
      .s = s.data_ptr(),
      .counters = static_cast<int*>(counters.data_ptr()),
      .multiprocessors = multiprocessors,
  };
  return run(x, [&](pk::device::Stream stream) { return pk::lora_product(call, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels_cuda, m) {
  m.def(
      "lora_product(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? scale_at, "
      "float scale, float inverse_keep, Tensor? seed, int threshold, bool drops_output, "
      "int multiprocessors, Tensor(a!)? y, Tensor(b!) s, Tensor(c!) counters) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels_cuda, PK_DISPATCH_KEY, m) {
  m.impl("lora_product", TORCH_BOX(&lora_product));
}
