"""Every activation of the Triton kernels and its derivative, over the whole range of float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels.adapter.activations import NAMES
from peft_kernels.core import triton_runtime
from tests.adapter.problems import ACTIVATIONS
from tests.numerics import assert_as_accurate_as_eager

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    # As on a GPU: e^-x is infinite, and the sigmoid made of it zero.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
RANGES = [1e-30, 1e-3, 1.0, 3.0, 8.0, 20.0, 100.0]


def _by_triton(activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return act(x) and act'(x), as the kernels' functions compute them."""
    from tests.adapter.activation_tile import apply

    return apply(activation, x)


def _by_torch(activation: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    leaf = x.to(dtype).requires_grad_()
    y = ACTIVATIONS[activation](leaf)
    return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


@pytest.mark.parametrize("bound", RANGES)
@pytest.mark.parametrize("activation", NAMES)
def test_as_accurate_as_eager(activation: str, bound: float) -> None:
    x = torch.linspace(-bound, bound, 8192)
    results = zip(
        ("value", "derivative"),
        _by_triton(activation, x),
        _by_torch(activation, x, torch.float32),
        _by_torch(activation, x, torch.float64),
        strict=True,
    )
    for name, found, eager, exact in results:
        assert_as_accurate_as_eager(f"{activation} {name}", found, [eager], exact, torch.float32)


@pytest.mark.parametrize("activation", NAMES)
def test_large_values_saturate(activation: str) -> None:
    beyond = torch.tensor([1e3, 1e10, 1e20, 3e38])
    for x in (beyond, -beyond):
        found, exact = _by_triton(activation, x), _by_torch(activation, x, torch.float64)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("activation", NAMES)
def test_a_nan_passes(activation: str) -> None:
    value, _ = _by_triton(activation, torch.tensor([float("nan")]))
    assert value.isnan().all()
