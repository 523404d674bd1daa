// The adapter in float, and the choice of the type's file.
#include "adapter_kernel.h"

namespace pk {

int adapter_pass(const AdapterPass& call, device::Stream stream) {
  if (call.type == Type::kFloat16) return adapter_pass_half(call, stream);
  if (call.type == Type::kBFloat16) return adapter_pass_bfloat16(call, stream);
  return launch_adapter_of<float, Shape<16, 64, 16, 1, 1>, Shape<64, 64, 16, 2, 2>>(call, stream);
}

}  // namespace pk
