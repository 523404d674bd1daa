// Element types of the kernels, their conversions and packs. Sums are always float.
#pragma once

#include <cstring>

#include "device.h"

namespace pk {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// How Python names them: what an op is given as `int type`.
enum class Type : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

PK_DEVICE float to_float(float value) { return value; }
PK_DEVICE float to_float(Half value) { return device::half_to_float(value.bits); }
PK_DEVICE float to_float(BFloat16 value) { return device::bfloat16_to_float(value.bits); }

// Rounded to nearest even.
template <typename T>
PK_DEVICE T from_float(float value);
template <>
PK_DEVICE float from_float<float>(float value) { return value; }
template <>
PK_DEVICE Half from_float<Half>(float value) { return {device::float_to_half(value)}; }
template <>
PK_DEVICE BFloat16 from_float<BFloat16>(float value) { return {device::float_to_bfloat16(value)}; }

template <typename T>
PK_DEVICE T zero() { return from_float<T>(0.0f); }

// N elements read and written at once; the address must be a multiple of their size.
template <typename T, int N>
struct alignas(N * sizeof(T) <= 16 ? N * sizeof(T) : 16) Pack {
  T values[N];

  PK_DEVICE T& operator[](int i) { return values[i]; }
  PK_DEVICE const T& operator[](int i) const { return values[i]; }
};

// As many elements as 16 bytes hold.
template <typename T>
constexpr int kPackOf16 = 16 / static_cast<int>(sizeof(T));

template <typename T, int N>
PK_DEVICE Pack<T, N> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, N>*>(address);
}
template <typename T, int N>
PK_DEVICE void store_pack(T* address, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

PK_HOST_DEVICE bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

// A value read as another type, for gradients that may be wider than what is computed in.
PK_DEVICE void store_as(void* data, Type type, int64_t index, float value) {
  if (type == Type::kFloat32)
    static_cast<float*>(data)[index] = value;
  else if (type == Type::kBFloat16)
    static_cast<BFloat16*>(data)[index] = from_float<BFloat16>(value);
  else
    static_cast<Half*>(data)[index] = from_float<Half>(value);
}

}  // namespace pk
