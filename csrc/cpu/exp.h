// The exponential of sixteen lanes, and sums and maxima over them.
#pragma once

#include "vec.h"

namespace pk {

typedef int32_t vi __attribute__((vector_size(64), aligned(4), may_alias));

PK_INLINE vf splat(float value) { return vf{} + value; }

PK_INLINE vi as_bits(vf value) { return (vi)value; }

PK_INLINE vf as_floats(vi value) { return (vf)value; }

// The bits of a where mask is all ones, zero where it is zero.
PK_INLINE vf masked(vf value, vi mask) { return as_floats(as_bits(value) & mask); }

PK_INLINE vf select(vi mask, vf a, vf b) {
  return as_floats((as_bits(a) & mask) | (as_bits(b) & ~mask));
}

// A product rounded on its own: never the inner half of a fused multiply-add.
PK_INLINE vf product(vf a, float b) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_assoc_barrier(a * b);
#else
  return a * b;
#endif
}

// e^x, relative error about one unit in the last place; zero below 2^-126, NaN for NaN.
PK_INLINE vf exp(vf x) {
  constexpr float kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const vf shifted = x * 1.44269504088896340736f + kMagic;
  const vf n = shifted - kMagic;
  vf r = x - n * 0.693359375f;  // ln 2 in two parts, so that the remainder is exact
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vf power = as_floats((as_bits(shifted) << 23) + (127 << 23));
  return masked(p * power, ~(vi)(x < -87.3f));
}

template <int N>
PK_INLINE vf rotated(vf v) {
  return __builtin_shufflevector(
      v, v, N % 16, (1 + N) % 16, (2 + N) % 16, (3 + N) % 16, (4 + N) % 16, (5 + N) % 16,
      (6 + N) % 16, (7 + N) % 16, (8 + N) % 16, (9 + N) % 16, (10 + N) % 16, (11 + N) % 16,
      (12 + N) % 16, (13 + N) % 16, (14 + N) % 16, (15 + N) % 16);
}

PK_INLINE float sum_of(vf v) {
  v += rotated<8>(v);
  v += rotated<4>(v);
  v += rotated<2>(v);
  v += rotated<1>(v);
  return v[0];
}

// NaN where any lane is NaN or not, as it falls: the exponentials of such a row are NaN all the same.
PK_INLINE vf larger(vf a, vf b) { return select((vi)(a > b), a, b); }

PK_INLINE float max_of(vf v) {
  v = larger(v, rotated<8>(v));
  v = larger(v, rotated<4>(v));
  v = larger(v, rotated<2>(v));
  return larger(v, rotated<1>(v))[0];
}

}  // namespace pk
