// LoRA products too small for a GEMM call; `weight` is given, and y or dx come out complete.
#pragma once

#include "lora.h"

namespace pk {

void lora_forward_small(const LoRAForward& call);
void lora_backward_small(const LoRABackward& call);

}  // namespace pk
