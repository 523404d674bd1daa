"""The activations of ``activations.py`` for Triton, chosen when a kernel is compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Return tanh = n / (n + 2) with n = e^2|x| - 1; near zero, where that cancels, its series."""
    square = x * x
    series = x * (
        1.0
        + square
        * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.021869488)))
    )
    # 1 to the last bit above 10; a NaN passes, which it would not through a minimum.
    n = tl.exp(2.0 * tl.where(tl.abs(x) > 10.0, 10.0, tl.abs(x))) - 1.0
    beyond = n / (n + 2.0)
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -beyond, beyond))


@triton.jit
def _tanh_derivative(x, t):
    """Return 1 - t² of t = tanh x: where that cancels 4 e / (1 + e)² with e = e^-2|x|."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(tl.abs(x) < 0.5, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def _gelu_inner(x):
    """Return tanh's argument in GELU's approximation."""
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def _gelu_bound(x):
    """Return x within bounds beyond which GELU's approximation is flat: its cube is finite."""
    return tl.where(x > 16.0, 16.0, tl.where(x < -16.0, -16.0, x))


@triton.jit
def _gated_derivative(x, FACTOR: tl.constexpr):
    """Return the derivative of x sigmoid(FACTOR x)."""
    s = tl.sigmoid(FACTOR * x)
    return s + FACTOR * (x * (s * (1.0 - s)))


@triton.jit
def _mish_bound(x):
    """Return x up to 20, where tanh(softplus(x)) is 1 to the last bit."""
    return tl.where(x > 20.0, 20.0, x)


@triton.jit
def _mish_gate(e):
    """Return tanh(softplus(x)) = n / (n + 2) with n = e (e + 2), of e = e^x."""
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
        return 0.5 * x * (1.0 + _tanh(_gelu_inner(_gelu_bound(x))))
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
        return x * _mish_gate(tl.exp(_mish_bound(x)))
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
        z = _gelu_bound(x)
        t = _tanh(_gelu_inner(z))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope
    elif ACTIVATION == "quick_gelu":
        return _gated_derivative(x, 1.702)
    elif ACTIVATION == "silu":
        return _gated_derivative(x, 1.0)
    elif ACTIVATION == "tanh":
        return _tanh_derivative(x, _tanh(x))
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1.0 - s)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, 1.0, 0.01)
    elif ACTIVATION == "relu6":
        return tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0)
    elif ACTIVATION == "mish":
        # sigmoid(x) (1 - t²) of the gate t as a product: 1 - t² cancels where t is nearly one.
        z = _mish_bound(x)
        e = tl.exp(z)
        below = 1.0 / (e * (e + 2.0) + 2.0)
        part = e * below
        return part * (e + 2.0) + z * part * (4.0 * (1.0 + e) * below)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.zeros_like(x) + 1.0
