// The activations of a bottleneck and their derivatives, as PyTorch defines them.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace pk {

// The order is that of ACTIVATIONS in peft_kernels/adapter/cpp.py.
enum class Activation : int64_t {
  kIdentity, kReLU, kGELU, kGELUTanh, kQuickGELU, kSiLU, kTanh, kSigmoid, kLeakyReLU, kReLU6, kMish,
};

struct Activated {
  float value, derivative;
};

// act(x) and act'(x). Loops call it with a constant activation, see with_activation.
inline __attribute__((always_inline)) Activated activate(Activation activation, float x) {
  const auto sigmoid = [](float z) { return 1.0f / (1.0f + std::exp(-z)); };
  switch (activation) {
    case Activation::kIdentity:
      return {x, 1.0f};
    case Activation::kReLU:  // Comparisons are such that a NaN passes through.
      return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
    case Activation::kGELU: {
      const float cdf = 0.5f * (1.0f + std::erf(x * 0.70710678118654752440f));
      return {x * cdf, cdf + x * 0.39894228040143267794f * std::exp(-0.5f * x * x)};
    }
    case Activation::kGELUTanh: {
      constexpr float kBeta = 0.79788456080286535588f, kCubic = 0.044715f;
      const float t = std::tanh(kBeta * (x + kCubic * x * x * x));
      const float inner = kBeta * (1.0f + 3.0f * kCubic * x * x);
      return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner};
    }
    case Activation::kQuickGELU: {
      const float s = sigmoid(1.702f * x);
      return {x * s, s + 1.702f * x * s * (1.0f - s)};
    }
    case Activation::kSiLU: {
      const float s = sigmoid(x);
      return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    case Activation::kTanh: {
      const float t = std::tanh(x);
      return {t, 1.0f - t * t};
    }
    case Activation::kSigmoid: {
      const float s = sigmoid(x);
      return {s, s * (1.0f - s)};
    }
    case Activation::kLeakyReLU:
      return {x > 0.0f ? x : 0.01f * x, x > 0.0f ? 1.0f : 0.01f};
    case Activation::kReLU6:
      return {x <= 0.0f ? 0.0f : x >= 6.0f ? 6.0f : x, x <= 0.0f || x >= 6.0f ? 0.0f : 1.0f};
    case Activation::kMish: {
      const float t = std::tanh(x > 20.0f ? x : std::log1p(std::exp(x)));
      return {x * t, t + x * sigmoid(x) * (1.0f - t * t)};
    }
  }
  __builtin_unreachable();
}

// run(std::integral_constant<Activation, activation>{}): the choice is made once, not per element.
template <typename Run>
inline __attribute__((always_inline)) void with_activation(Activation activation, const Run& run) {
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
