// exp, sigmoid, tanh and the normal distribution on vf lanes: one to three units in the last place,
// beside what rounding an exponent's argument costs (the far tail of the normal distribution).
//
// Every select keeps NaN: its comparison is such that the lane itself is taken. The polynomials are
// minimax fits over the range named beside them.
#pragma once

#include "vec.h"

namespace pk {

PK_INLINE vf lanes(float value) { return value - vf{}; }
PK_INLINE vf at_most(vf x, float bound) { return x > bound ? lanes(bound) : x; }
PK_INLINE vf at_least(vf x, float bound) { return x < bound ? lanes(bound) : x; }
PK_INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7FFFFFFFu); }
PK_INLINE vf with_sign_of(vf size, vf x) { return (vf)((vu)size | ((vu)x & 0x80000000u)); }

// 2^n for whole n from -126 to 127, in the low bits of the float 1.5 * 2^23 + n.
PK_INLINE vf power_of_two(vu n) { return (vf)((n + 127u) << 23); }

// c[0] + c[1] x + ...
template <int N>
PK_INLINE vf polynomial(vf x, const float (&c)[N]) {
  vf sum = lanes(c[N - 1]);
  PK_UNROLL for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// x = n log 2 + r, e^r by a polynomial over |r| <= log 2 / 2, and 2^n in two factors: it may be denormal.
PK_INLINE vf exponential(vf x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  constexpr float kLog2 = 1.44269504f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;
  constexpr float kTail[] = {4.999999345e-01f, 1.666652063e-01f, 4.166838800e-02f,
                             8.368716896e-03f, 1.381460089e-03f};
  x = at_least(at_most(x, 89.0f), -104.0f);  // beyond, infinity and zero as there
  const vf shifted = x * kLog2 + kRound, n = shifted - kRound;
  const vf r = (x - n * kHigh) - n * kLow;
  const vf e = (polynomial(r, kTail) * r * r + r) + 1.0f;
  const vu whole = (vu)shifted - 0x4B400000u;
  const vu half = (vu)((whole + 0x100u) >> 1) - 0x80u;  // rounded down, also below zero
  return e * power_of_two(half) * power_of_two(whole - half);
}

struct Sigmoid {
  vf value, derivative;
};

// 1 / (1 + e^-x) and its derivative, both by e^-|x|: only differences without rounding are formed.
PK_INLINE Sigmoid sigmoid(vf x) {
  const vf e = exponential(-magnitude(x)), high = 1.0f / (1.0f + e);
  const vf low = e > 0.5f ? 1.0f - high : e * high;
  return {x < 0.0f ? low : high, low * high};
}

// An odd polynomial over |x| <= 0.625, beyond it 1 - 2 / (e^2|x| + 1).
PK_INLINE vf hyperbolic_tangent(vf x) {
  constexpr float kTail[] = {-3.333328393e-01f, 1.333149128e-01f, -5.374349774e-02f,
                             2.065058607e-02f, -5.717043591e-03f};
  const vf size = magnitude(x), square = size * size;
  const vf near = polynomial(square, kTail) * square * size + size;
  const vf far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return with_sign_of(size < 0.625f ? near : far, x);
}

// The standard normal distribution: what lies below x, and e^(-x^2 / 2), its density times sqrt(2 pi).
struct Normal {
  vf below, bell;
};

// The part below is 1 / 2 and an odd polynomial over |x| <= 1.25. That beyond |x| is the bell times a
// polynomial in 1 / (1 + 0.3 |x|), over |x| <= 14.5 where it runs into zero.
PK_INLINE Normal normal(vf x) {
  constexpr float kNear[] = {3.989422587e-01f, -6.648998549e-02f, 9.971500786e-03f,
                             -1.182709616e-03f, 1.103274581e-04f, -6.644859798e-06f};
  constexpr float kTail[] = {1.196866898e-01f, 1.195718144e-01f, 1.102354196e-01f, 7.838967515e-02f,
                             9.615675367e-02f, -7.942333573e-02f, 1.917843382e-01f,
                             -2.282134457e-01f, 1.124355447e-01f, -2.062345596e-02f};
  const vf size = magnitude(x), square = x * x, bell = exponential(-0.5f * square);
  const vf u = 1.0f / (1.0f + 0.3f * size), tail = polynomial(u, kTail) * u * bell;
  const vf far = x > 0.0f ? 1.0f - tail : tail;
  return {size < 1.25f ? 0.5f + x * polynomial(square, kNear) : far, bell};
}

}  // namespace pk
