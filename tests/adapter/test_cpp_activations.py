"""Every activation of the C++ backend and its derivative, over the whole range of float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels.adapter import cpp
from tests.adapter.activation_rule import RANGES, assert_activation_as_accurate, by_torch

BEYOND = torch.tensor([1e3, 1e10, 1e20, 3e38])
EPS = 2.0**-23
# Relative, in units of the last place, where float64 itself has no difference of like numbers.
UNITS = {"silu": 4, "tanh": 2, "sigmoid": 3, "leaky_relu": 1, "mish": 5}


def _by_cpp(activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return act(x) and act'(x), as an adapter of width one with weights of one gives them."""
    one, column = torch.ones(1, 1), x[:, None]
    y, pre, dx = (torch.full_like(column, float("nan")) for _ in range(3))
    call = (None, None, 1.0, activation, None, 0.0)
    cpp.forward(column, one, one, None, None, None, *call[2:], y, pre)
    cpp.backward(
        torch.ones_like(column), column, pre, one, one, *call, False, dx, None, None, None, None,
        None,
    )  # fmt: skip
    return y[:, 0], dx[:, 0]


@pytest.mark.parametrize("bound", RANGES)
@pytest.mark.parametrize("activation", cpp.ACTIVATIONS)
def test_as_accurate_as_eager(activation: str, bound: float) -> None:
    x = torch.linspace(-bound, bound, 40001)
    assert_activation_as_accurate(activation, _by_cpp, x)


@pytest.mark.parametrize("activation", UNITS)
def test_relative_error_is_a_few_units_in_the_last_place(activation: str) -> None:
    sizes = torch.logspace(-37, 1.9, 20001)
    x = torch.cat([sizes, -sizes])
    found, _ = _by_cpp(activation, x)
    exact, _ = by_torch(activation, x, torch.float64)
    normal = exact.abs() > 2.0**-126
    unit = 2.0 ** (exact.abs()[normal].log2().floor()) * EPS
    error = (found.double() - exact).abs()[normal] / unit
    assert normal.sum() > 20000 and error.max() <= UNITS[activation]


def test_the_tail_of_gelu_is_not_a_difference() -> None:
    """Where eager's 1 + erf has nothing left, ours still has a relative error of 1e-5."""
    x = torch.linspace(-12.0, 0.0, 10001)
    found, _ = _by_cpp("gelu", x)
    wide = x.double()
    exact = wide * 0.5 * torch.special.erfc(-wide * 0.5**0.5)
    assert ((found.double() - exact).abs() <= 1e-5 * exact.abs()).all()


@pytest.mark.parametrize("activation", cpp.ACTIVATIONS)
def test_large_values_saturate(activation: str) -> None:
    for x in (BEYOND, -BEYOND):
        found, exact = _by_cpp(activation, x), by_torch(activation, x, torch.float64)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=EPS, atol=0.0)


@pytest.mark.parametrize("activation", cpp.ACTIVATIONS)
def test_infinity_nan_and_the_least_numbers(activation: str) -> None:
    inf = float("inf")
    x = torch.tensor([inf, -inf, float("nan"), 0.0, -0.0, 1e-45, -1e-45])
    found, _ = _by_cpp(activation, x)
    exact, _ = by_torch(activation, x, torch.float64)
    torch.testing.assert_close(found, exact.float(), rtol=EPS, atol=0.0, equal_nan=True)
