"""The activations of ``activations.py`` for Triton, chosen when a kernel is compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Return tanh: near zero, where 2 sigmoid(2x) - 1 cancels, its series."""
    square = x * x
    series = x * (
        1.0
        + square
        * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.021869488)))
    )
    return tl.where(square < 0.0625, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _mish_gate(x):
    """Return tanh(softplus(x)) = n / (n + 2) with n = e^x (e^x + 2); 1 to the last bit above 20."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of a float32 tile."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        return _tanh(x)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(x)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, x, 0.01 * x)
    elif ACTIVATION == "relu6":
        return tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
    elif ACTIVATION == "mish":
        return x * _mish_gate(x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """Return the derivative of the activation on a float32 tile."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        return s + 1.702 * x * s * (1.0 - s)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s + x * s * (1.0 - s)
    elif ACTIVATION == "tanh":
        t = _tanh(x)
        return 1.0 - t * t
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1.0 - s)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, 1.0, 0.01)
    elif ACTIVATION == "relu6":
        return tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0)
    elif ACTIVATION == "mish":
        t = _mish_gate(x)
        return t + x * tl.sigmoid(x) * (1.0 - t * t)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.zeros_like(x) + 1.0
