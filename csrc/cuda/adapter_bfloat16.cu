// The adapter in bfloat16.
#include "adapter_kernel.h"

namespace pk {

int adapter_pass_bfloat16(const AdapterPass& call, device::Stream stream) {
  return launch_adapter_16_bit<BFloat16>(call, stream);
}

}  // namespace pk
