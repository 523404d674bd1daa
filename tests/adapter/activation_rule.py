"""How activations are judged, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.adapter.problems import ACTIVATIONS
from tests.numerics import assert_as_accurate_as_eager

# Where they are looked at: between plus and minus each.
RANGES = [1e-30, 1e-3, 1.0, 3.0, 8.0, 20.0, 100.0]

# From a name and x [n] to act(x) and act'(x).
Activate = Callable[[str, Tensor], tuple[Tensor, Tensor]]


def by_torch(activation: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return act(x) and act'(x) of PyTorch in a dtype."""
    leaf = x.to(dtype).requires_grad_()
    y = ACTIVATIONS[activation](leaf)
    return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


def assert_activation_as_accurate(activation: str, by_backend: Activate, x: Tensor) -> None:
    """Judge value and derivative in float32 by the 1.5x rule."""
    results = zip(
        ("value", "derivative"),
        by_backend(activation, x),
        by_torch(activation, x, torch.float32),
        by_torch(activation, x, torch.float64),
        strict=True,
    )
    for name, found, eager, exact in results:
        assert_as_accurate_as_eager(f"{activation} {name}", found, [eager], exact, torch.float32)
