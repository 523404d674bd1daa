// The adapter in half.
#include "adapter_kernel.h"

namespace pk {

int adapter_pass_half(const AdapterPass& call, device::Stream stream) {
  return launch_adapter_16_bit<Half>(call, stream);
}

}  // namespace pk
