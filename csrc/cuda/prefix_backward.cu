// Backward of prefix attention: which launches a call needs, and the gate's gradient.
#include <cmath>

#include "prefix.h"

namespace pk {
namespace {

constexpr int kThreads = 128;

// Grid (query heads,): dgate = (1 - tanh^2) Σ delta_p of the head's rows, in a fixed order.
PK_KERNEL PK_LAUNCH_BOUNDS(kThreads, 1) void prefix_gate_gradient_kernel(
    PrefixCall call, const float* prefix_delta, float* d_gate) {
  char* cursor = device::shared_memory();
  float* shared = device::carve<float>(cursor, kThreads);
  const int64_t head = device::block_x();
  float total = 0.0f;
  for (int64_t batch = 0; batch < call.batch; ++batch)
    for (int64_t i = device::thread_x(); i < call.queries; i += kThreads)
      total += prefix_delta[(batch * call.heads + head) * call.queries + i];
  shared[device::thread_x()] = total;
  device::sync_threads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (device::thread_x() < width)
      shared[device::thread_x()] += shared[device::thread_x() + width];
    device::sync_threads();
  }
  const float strength = tanhf(call.gate[head]);
  if (device::thread_x() == 0) d_gate[head] = (1.0f - strength * strength) * shared[0];
}

}  // namespace

int prefix_backward(
    const PrefixCall& call, const PrefixGradients& gradients, device::Stream stream) {
  const bool keys = (gradients.d_key || gradients.d_value) && call.keys;
  const bool prefix = (gradients.d_prefix_key || gradients.d_prefix_value) && call.prefix;
  // Gradients of values alone need no delta; in float they need the correction.
  const bool first = gradients.d_query || gradients.d_key || gradients.d_prefix_key ||
                     gradients.d_gate || (call.type == Type::kFloat32 && (keys || prefix));
  int status = first ? prefix_query_gradient(call, gradients, stream) : 0;
  if (!status && keys) status = prefix_key_gradient(call, gradients, false, stream);
  if (!status && prefix) status = prefix_key_gradient(call, gradients, true, stream);
  if (!status && gradients.d_gate)
    status = device::launch(
        "prefix_gate_gradient_kernel", prefix_gate_gradient_kernel, {call.heads}, kThreads,
        device::carved_bytes(kThreads * sizeof(float)), stream, call, gradients.prefix_delta,
        gradients.d_gate);
  return status;
}

}  // namespace pk
