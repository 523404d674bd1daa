"""What judges the kernels notices what it has to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import RoundedToTF32, assert_as_accurate_as_eager


def cut_to_tf32(value: Tensor) -> Tensor:
    """Return float32 values without their last 13 bits, which is how tensor cores read them."""
    return (value.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_operands_cut_to_tf32_are_told_from_rounded_ones() -> None:
    a, b = torch.randn(300, 515), torch.randn(515, 77)
    exact = a.double() @ b.double()
    with RoundedToTF32():
        eager, other_order = a @ b, (a.flip(1) @ b.flip(0))
    assert not torch.equal(eager, a @ b)
    assert_as_accurate_as_eager("rounded", other_order, [eager], exact, torch.float32)
    with pytest.raises(AssertionError, match="cut: error"):
        cut = cut_to_tf32(a) @ cut_to_tf32(b)
        assert_as_accurate_as_eager("cut", cut, [eager], exact, torch.float32)


def test_operands_are_rounded_in_forward_and_in_backward() -> None:
    a = torch.randn(8, 40, requires_grad=True)
    b = torch.randn(40, 8, requires_grad=True)
    with RoundedToTF32():
        products = [a @ b, torch.addmm(torch.zeros(8), a, b), (a[None] @ b[None])[0]]
        gradients = [torch.autograd.grad(y.square().sum(), [a, b]) for y in products]
    exact = (a.double() @ b.double()).detach()
    grad_of_a = 2 * exact @ b.detach().double().mT
    for y, (of_a, _) in zip(products, gradients, strict=True):
        assert 1e-4 < (y - exact).abs().max() < 2e-2
        assert 1e-4 < (of_a - grad_of_a).abs().max() < 1.0
