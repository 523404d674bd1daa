// LoRA's products in float, and the choice of the type's file.
#include "lora_kernel.h"

namespace pk {

int lora_product(const LoRAProduct& call, device::Stream stream) {
  if (call.type == Type::kFloat16) return lora_product_half(call, stream);
  if (call.type == Type::kBFloat16) return lora_product_bfloat16(call, stream);
  using S = Shape<64, 64, 16, 2, 2>;
  return call.along ? launch_lora<TileProduct<float, S, true, true>>(call, stream)
                    : launch_lora<TileProduct<float, S, true, false>>(call, stream);
}

}  // namespace pk
