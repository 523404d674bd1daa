// LoRA's products in bfloat16.
#include "lora_kernel.h"

namespace pk {

int lora_product_bfloat16(const LoRAProduct& call, device::Stream stream) {
  return launch_lora_16_bit<BFloat16>(call, stream);
}

}  // namespace pk
