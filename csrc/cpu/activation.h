// The activations of a bottleneck and their derivatives, as PyTorch defines them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vector_math.h"

namespace pk {

// The order is that of ACTIVATIONS in peft_kernels/adapter/cpp.py.
enum class Activation : int64_t {
  kIdentity, kReLU, kGELU, kGELUTanh, kQuickGELU, kSiLU, kTanh, kSigmoid, kLeakyReLU, kReLU6, kMish,
};

struct Activated {
  vf value, derivative;
};

// act(x) and act'(x). Loops call it with a constant activation, see with_activation.
PK_INLINE Activated activate(Activation activation, vf x) {
  const vf zero{}, one = lanes(1.0f);
  switch (activation) {  // Comparisons are such that a NaN passes through.
    case Activation::kIdentity:
      return {x, one};
    case Activation::kReLU:
      return {x <= 0.0f ? zero : x, x <= 0.0f ? zero : one};
    case Activation::kGELU: {
      const Normal n = normal(x);
      return {x * n.below, n.below + x * 0.39894228040143267794f * n.bell};
    }
    case Activation::kGELUTanh: {  // (1 + tanh z) / 2 = sigmoid(2 z), which is 0 or 1 at the bound
      constexpr float kBeta = 0.79788456080286535588f, kCubic = 0.044715f;
      const vf z = at_least(at_most(x, 16.0f), -16.0f), square = z * z;
      const Sigmoid s = sigmoid(2.0f * kBeta * (z + kCubic * square * z));
      const vf inner = 2.0f * kBeta * (1.0f + 3.0f * kCubic * square);
      return {x * s.value, s.value + z * s.derivative * inner};
    }
    case Activation::kQuickGELU: {
      const Sigmoid s = sigmoid(1.702f * x);
      return {x * s.value, s.value + 1.702f * (x * s.derivative)};
    }
    case Activation::kSiLU: {
      const Sigmoid s = sigmoid(x);
      return {x * s.value, s.value + x * s.derivative};
    }
    case Activation::kTanh: {
      const vf t = hyperbolic_tangent(x);
      return {t, 1.0f - t * t};
    }
    case Activation::kSigmoid: {
      const Sigmoid s = sigmoid(x);
      return {s.value, s.derivative};
    }
    case Activation::kLeakyReLU:
      return {x > 0.0f ? x : 0.01f * x, x > 0.0f ? one : lanes(0.01f)};
    case Activation::kReLU6:
      return {x <= 0.0f ? zero : x >= 6.0f ? lanes(6.0f) : x,
              x <= 0.0f ? zero : x >= 6.0f ? zero : one};
    case Activation::kMish: {  // tanh(log(1 + e^z)) = n / (n + 2) with n = e^z (e^z + 2), 1 at the bound
      const vf z = at_most(x, 20.0f), e = exponential(z);
      const vf n = e * (e + 2.0f), below = 1.0f / (n + 2.0f), t = n / (n + 2.0f);
      return {x * t, t + 4.0f * (z * (e * (1.0f + e) * below * below))};
    }
  }
  __builtin_unreachable();
}

// run(std::integral_constant<Activation, activation>{}): the choice is made once, not per element.
template <typename Run>
PK_INLINE void with_activation(Activation activation, const Run& run) {
  switch (activation) {
#define PK_CASE(name)        \
  case Activation::name:     \
    return run(std::integral_constant<Activation, Activation::name>{});
    PK_CASE(kIdentity)
    PK_CASE(kReLU)
    PK_CASE(kGELU)
    PK_CASE(kGELUTanh)
    PK_CASE(kQuickGELU)
    PK_CASE(kSiLU)
    PK_CASE(kTanh)
    PK_CASE(kSigmoid)
    PK_CASE(kLeakyReLU)
    PK_CASE(kReLU6)
    PK_CASE(kMish)
#undef PK_CASE
  }
}

}  // namespace pk
