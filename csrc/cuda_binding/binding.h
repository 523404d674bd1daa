// What every file of bindings shares: tensors as kernels take them, the stream, the device, the status.
//
// An op is registered as peft_kernels_cuda::<name>(...) -> int for CUDA tensors, or for CPU tensors
// where the kernels are emulated. It returns 0, or the number of the first error of its launches:
// what is thrown here would reach Python without its text, peft_kernels_cuda_error() gives it one.
// Python checks arguments and allocates outputs, so that nothing is checked twice here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/device.h"
#include "cuda/types.h"

#ifdef PEFT_KERNELS_EMULATED
#define PK_DISPATCH_KEY CPU
#else
#define PK_DISPATCH_KEY CUDA
#endif

namespace pk::binding {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

inline int64_t bytes_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<int64_t>(tensor->element_size()) : 0;
}

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Half: return Type::kFloat16;
    case torch::headeronly::ScalarType::BFloat16: return Type::kBFloat16;
    default: return Type::kFloat32;
  }
}

// Return `launches(stream)`, run on the device and the current stream of `like`.
template <typename Launches>
int64_t run(const Tensor& like, Launches launches) {
#ifdef PEFT_KERNELS_EMULATED
  return launches(device::Stream{});
#else
  const int32_t index = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return launches(static_cast<device::Stream>(stream));
#endif
}

}  // namespace pk::binding
