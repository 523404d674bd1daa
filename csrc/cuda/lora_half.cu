// LoRA's products in half.
#include "lora_kernel.h"

namespace pk {

int lora_product_half(const LoRAProduct& call, device::Stream stream) {
  return launch_lora_16_bit<Half>(call, stream);
}

}  // namespace pk
