"""Every activation of the Triton kernels and its derivative, over the whole range of float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels.adapter.activations import NAMES
from peft_kernels.core import triton_runtime
from tests.adapter.activation_rule import RANGES, assert_activation_as_accurate, by_torch

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    # As on a GPU: e^-x is infinite, and the sigmoid made of it zero.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]


def _by_triton(activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return act(x) and act'(x), as the kernels' functions compute them."""
    from tests.adapter.activation_tile import apply

    return apply(activation, x)


@pytest.mark.parametrize("bound", RANGES)
@pytest.mark.parametrize("activation", NAMES)
def test_as_accurate_as_eager(activation: str, bound: float) -> None:
    x = torch.linspace(-bound, bound, 8192)
    assert_activation_as_accurate(activation, _by_triton, x)


@pytest.mark.parametrize("activation", NAMES)
def test_large_values_saturate(activation: str) -> None:
    beyond = torch.tensor([1e3, 1e10, 1e20, 3e38])
    for x in (beyond, -beyond):
        found, exact = _by_triton(activation, x), by_torch(activation, x, torch.float64)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("activation", NAMES)
def test_a_nan_passes(activation: str) -> None:
    value, _ = _by_triton(activation, torch.tensor([float("nan")]))
    assert value.isnan().all()
