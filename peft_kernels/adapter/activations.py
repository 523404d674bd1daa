"""The activations of the bottleneck, value and derivative, in plain PyTorch.

``activation_kernels.py`` holds the same for Triton, in the same order. At a kink the derivative is
the one that torch's autograd takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_Function = Callable[[Tensor], Tensor]


def _gelu_derivative(x: Tensor) -> Tensor:
    cdf = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    slope = math.sqrt(2.0 / math.pi)
    x = x.clamp(-16.0, 16.0)  # flat beyond, where squares and cubes would be infinite
    t = torch.tanh(slope * (x + 0.044715 * x * x * x))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope * (1.0 + 0.134145 * x * x)


def _gated_derivative(x: Tensor, factor: float) -> Tensor:
    """Return the derivative of x · sigmoid(factor · x)."""
    s = torch.sigmoid(factor * x)
    return s + factor * (x * (s * (1.0 - s)))  # factor * x may be infinite


def _mish_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * torch.sigmoid(x) * (1.0 - t * t)


def _step(x: Tensor, below: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, below))


_FORMS: dict[str, tuple[_Function, _Function]] = {
    "relu": (torch.relu, lambda x: _step(x, 0.0)),
    "gelu": (F.gelu, _gelu_derivative),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_derivative),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: _gated_derivative(x, 1.702)),
    "silu": (F.silu, lambda x: _gated_derivative(x, 1.0)),
    "tanh": (torch.tanh, lambda x: 1.0 - torch.tanh(x).square()),
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * (1.0 - torch.sigmoid(x))),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.01), lambda x: _step(x, 0.01)),
    "relu6": (F.relu6, lambda x: ((x > 0) & (x < 6)).to(x.dtype)),
    "mish": (F.mish, _mish_derivative),
    "identity": (lambda x: x, torch.ones_like),
}
NAMES = tuple(_FORMS)


def check_activation(value: object) -> str:
    """Return ``value`` checked as the name of an activation.

    Raises:
        ValueError: unknown, with the list of the known ones.
    """
    if not isinstance(value, str) or value not in _FORMS:
        raise ValueError(f"activation must be one of {', '.join(NAMES)}, got {value!r}")
    return value


def activate(name: str, x: Tensor) -> Tensor:
    """Return the activation of x."""
    return _FORMS[name][0](x)


def derivative(name: str, x: Tensor) -> Tensor:
    """Return the derivative of the activation at x."""
    return _FORMS[name][1](x)
