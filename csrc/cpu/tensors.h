// Tensors as the kernels take them.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace pk {

enum class Type : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// A matrix with unit inner stride, of the call's type; strides are in elements.
struct Matrix {
  void* data;
  int64_t stride;
};

// Some rows of a matrix: `count` from `first` on, or those that `order` names where it is not null.
struct Rows {
  int64_t first, count;
  const int64_t* order;

  PK_INLINE int64_t operator[](int64_t m) const { return order ? order[m] : first + m; }
  Rows part(int64_t begin, int64_t most) const {
    const int64_t left = count - begin;
    return {first + begin, left < most ? left : most, order ? order + begin : nullptr};
  }
};

// A gradient to be written, contiguous; null where it is not wanted.
struct Gradient {
  void* data;
  Type type;

  int64_t bytes(int64_t elements) const {
    return elements * static_cast<int64_t>(type == Type::kFloat32 ? sizeof(float) : sizeof(bfloat16));
  }
  // The part of one of many that lie behind each other, `size` elements each.
  Gradient of(int64_t number, int64_t size) const {
    return {data ? static_cast<char*>(data) + bytes(number * size) : nullptr, type};
  }
};

inline void set_zero(const Gradient& gradient, int64_t size) {
  if (gradient.data) std::memset(gradient.data, 0, gradient.bytes(size));
}

}  // namespace pk
