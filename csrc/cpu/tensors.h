// Tensors as the kernels take them.
#pragma once

#include <cstdint>

namespace pk {

enum class Type : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// A matrix with unit inner stride, of the call's type; strides are in elements.
struct Matrix {
  void* data;
  int64_t stride;
};

// A gradient to be written, contiguous; null where it is not wanted.
struct Gradient {
  void* data;
  Type type;
};

}  // namespace pk
