// Sixteen float32 lanes, element access to float32 and bfloat16, and the function clones per CPU.
//
// GCC's vector extensions lower `vf` to whatever the clone has: one AVX-512 register, two AVX2
// registers, four SSE or NEON ones. Everything here is forced inline so that it is compiled inside
// the clone that calls it.
#pragma once

#include <cstdint>
#include <cstring>

// Accumulators stay in registers only where their loop is unrolled before they are allocated.
#define PK_UNROLL _Pragma("GCC unroll 16")
#define PK_INLINE inline __attribute__((always_inline))
#define PK_INLINE_LAMBDA __attribute__((always_inline))

#if defined(PK_CLONES)
// One version is enough for this build, which says so: of functions under a sanitizer.
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PK_CLONES
#endif

namespace pk {

constexpr int64_t kLanes = 16;
typedef float vf __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2), may_alias));

struct bfloat16 {
  uint16_t bits;
};

PK_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

PK_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

PK_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

PK_INLINE float to_float(float value) { return value; }

PK_INLINE float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// Round to nearest even; NaN stays NaN.
PK_INLINE void from_float(float value, float* out) { *out = value; }

PK_INLINE void from_float(float value, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7FC0u : rounded);
}

template <typename T>
PK_INLINE float rounded(float value) {
  T out;
  from_float(value, &out);
  return to_float(out);
}

PK_INLINE vf load(const bfloat16* p) {
  vh bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}

// As from_float rounds.
PK_INLINE void store(bfloat16* p, vf v) {
  const vu bits = (vu)v, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const vu out = (bits & 0x7FFFFFFFu) > 0x7F800000u ? vu{} + 0x7FC0u : rounded;
  const vh halves = __builtin_convertvector(out, vh);
  std::memcpy(p, &halves, sizeof(halves));
}

// The first `count` of kLanes elements, and zeros.
template <typename T>
PK_INLINE vf load_some(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

template <typename T>
PK_INLINE void store_some(T* p, vf v, int64_t count) {
  if (count == kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) from_float(lanes[i], p + i);
}

template <typename T>
PK_INLINE vf rounded(vf v) {
  T lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}

}  // namespace pk
