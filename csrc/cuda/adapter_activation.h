// The activations of a bottleneck and their derivatives, as peft_kernels/adapter/activations.py has them.
#pragma once

#include <cmath>

#include "types.h"

namespace pk {

// The order is that of NAMES in peft_kernels/adapter/activations.py.
enum class Activation : int64_t {
  kReLU, kGELU, kGELUTanh, kQuickGELU, kSiLU, kTanh, kSigmoid, kLeakyReLU, kReLU6, kMish, kIdentity,
};

PK_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

PK_DEVICE float normal_below(float x) { return 0.5f * (1.0f + erff(x * 0.7071067811865476f)); }

// The inner function of GELU's approximation is odd and flat beyond: a bound keeps its cube finite.
PK_DEVICE float gelu_bound(float x) { return x > 16.0f ? 16.0f : x < -16.0f ? -16.0f : x; }
PK_DEVICE float gelu_tanh(float x) {
  return tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
}

// tanh(softplus(x)) = n / (n + 2) with n = e^x (e^x + 2); 1 to the last bit at the bound.
PK_DEVICE float mish_bound(float x) { return x > 20.0f ? 20.0f : x; }
PK_DEVICE float mish_gate(float e) {
  const float n = e * (e + 2.0f);
  return n / (n + 2.0f);
}

// Comparisons are such that a NaN passes through.
PK_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kReLU: return x <= 0.0f ? 0.0f : x;
    case Activation::kGELU: return x * normal_below(x);
    case Activation::kGELUTanh: return 0.5f * x * (1.0f + gelu_tanh(gelu_bound(x)));
    case Activation::kQuickGELU: return x * sigmoid(1.702f * x);
    case Activation::kSiLU: return x * sigmoid(x);
    case Activation::kTanh: return tanhf(x);
    case Activation::kSigmoid: return sigmoid(x);
    case Activation::kLeakyReLU: return x > 0.0f ? x : 0.01f * x;
    case Activation::kReLU6: return x <= 0.0f ? 0.0f : x >= 6.0f ? 6.0f : x;
    case Activation::kMish: return x * mish_gate(expf(mish_bound(x)));
    default: return x;
  }
}

PK_DEVICE float gated_derivative(float x, float factor) {
  const float s = sigmoid(factor * x);
  return s + factor * (x * (s * (1.0f - s)));
}

PK_DEVICE float derivative(Activation activation, float x) {
  switch (activation) {
    case Activation::kReLU: return x <= 0.0f ? 0.0f : 1.0f;
    case Activation::kGELU:
      return normal_below(x) + x * expf(-0.5f * x * x) * 0.3989422804014327f;
    case Activation::kGELUTanh: {
      const float z = gelu_bound(x), t = gelu_tanh(z);
      const float slope = 0.7978845608028654f * (1.0f + 0.134145f * z * z);
      return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * slope;
    }
    case Activation::kQuickGELU: return gated_derivative(x, 1.702f);
    case Activation::kSiLU: return gated_derivative(x, 1.0f);
    case Activation::kTanh: {
      const float t = tanhf(x);
      return 1.0f - t * t;
    }
    case Activation::kSigmoid: {
      const float s = sigmoid(x);
      return s * (1.0f - s);
    }
    case Activation::kLeakyReLU: return x > 0.0f ? 1.0f : 0.01f;
    case Activation::kReLU6: return x > 0.0f && x < 6.0f ? 1.0f : 0.0f;
    case Activation::kMish: {
      const float z = mish_bound(x), e = expf(z), below = 1.0f / (e * (e + 2.0f) + 2.0f);
      return mish_gate(e) + 4.0f * (z * (e * (1.0f + e) * below * below));
    }
    default: return 1.0f;
  }
}

}  // namespace pk
