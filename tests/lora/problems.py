"""Random LoRA problems, and what float64 and eager PyTorch make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import lora_linear
from peft_kernels.core import rng
from tests.numerics import assert_as_accurate_as_eager, eager_forms

OTHER_ORDERS = 4  # in which eager PyTorch adds, when it is the measure
NAMES = ("y", "dx", "dweight", "da", "db", "dbias")


@dataclass(frozen=True)
class Problem:
    """Tensors of one call, in the dtype they are given in."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    dy: Tensor
    scale: float
    dropout_p: float
    seed: Tensor

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return fresh leaves of the differentiable inputs, in ``dtype`` where it is given."""
        tensors = [self.x, self.weight, self.lora_a, self.lora_b]
        tensors += [] if self.bias is None else [self.bias]
        return [_leaf(t if dtype is None else t.to(dtype)) for t in tensors]


def _leaf(value: Tensor) -> Tensor:
    # Keeps strides, which clone() would not for every layout.
    return value.detach().requires_grad_()


def problem(
    tokens: int | tuple[int, ...],
    out_features: int,
    in_features: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    bias: bool = True,
    scale: float = 1.5,
    seed: int = 0,
) -> Problem:
    """Return a random problem whose results are of order one."""
    generator = torch.Generator().manual_seed(seed)
    leading = (tokens,) if isinstance(tokens, int) else tokens

    def normal(*size: int, kind: torch.dtype = dtype, fan: int = 1) -> Tensor:
        return (torch.randn(*size, generator=generator) / fan**0.5).to(kind)

    small = adapter_dtype or dtype
    return Problem(
        x=normal(*leading, in_features),
        weight=normal(out_features, in_features, fan=in_features),
        lora_a=normal(rank, in_features, kind=small, fan=in_features),
        lora_b=normal(out_features, rank, kind=small, fan=rank),
        bias=normal(out_features, kind=small) if bias else None,
        dy=normal(*leading, out_features),
        scale=scale,
        dropout_p=dropout_p,
        seed=torch.randint(-(2**62), 2**62, (1,), generator=generator),
    )


def eager(given: Problem, inputs: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Return y as peft writes it, under the mask that the seed stands for, or another."""
    x, weight, lora_a, lora_b, *rest = inputs
    branch = x
    if given.dropout_p:
        branch = x * (_mask(given) if mask is None else mask) / (1.0 - given.dropout_p)
    base = F.linear(x, weight, rest[0] if rest else None)
    return base + F.linear(F.linear(branch, lora_a), lora_b) * given.scale


def _mask(given: Problem) -> Tensor:
    tokens = given.x.numel() // max(1, given.x.shape[-1])
    return rng.dropout_mask(given.seed, tokens, given.x.shape[-1], given.dropout_p).view(
        given.x.shape
    )


def eager_in_another_order(given: Problem, dtype: torch.dtype, order: int) -> dict[str, Tensor]:
    """Return y and every gradient of eager PyTorch, all sums added in an order drawn from a seed.

    Tokens, features and rank are permuted before, and the results permuted back; y and dx have one
    row for each token.
    """
    generator = torch.Generator().manual_seed(order)

    def permutation(size: int) -> Tensor:
        return torch.randperm(size, generator=generator).to(given.x.device)

    x = given.x.flatten(0, -2)
    tokens, inner = permutation(x.shape[0]), permutation(x.shape[1])
    outer, rank = permutation(given.weight.shape[0]), permutation(given.lora_a.shape[0])
    places = {
        "y": (tokens, outer),
        "dx": (tokens, inner),
        "dweight": (outer, inner),
        "da": (rank, inner),
        "db": (outer, rank),
        "dbias": (outer,),
    }
    permuted = replace(
        given,
        x=x[tokens][:, inner],
        weight=given.weight[outer][:, inner],
        lora_a=given.lora_a[rank][:, inner],
        lora_b=given.lora_b[outer][:, rank],
        bias=None if given.bias is None else given.bias[outer],
        dy=given.dy.flatten(0, -2)[tokens][:, outer],
    )
    mask = _mask(given).flatten(0, -2)[tokens][:, inner] if given.dropout_p else None
    inputs = permuted.inputs(dtype)
    found = results(eager(permuted, inputs, mask), inputs, permuted.dy)
    for name, value in found.items():
        for dim, place in enumerate(places[name]):
            value = value.index_select(dim, place.argsort())
        found[name] = value
    return found


def fused(given: Problem, inputs: list[Tensor], backend: str | None) -> Tensor:
    """Return y of the package."""
    x, weight, lora_a, lora_b, *rest = inputs
    return lora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        rest[0] if rest else None,
        scale=given.scale,
        dropout_p=given.dropout_p,
        seed=given.seed if given.dropout_p else None,
        backend=backend,
    )


def results(y: Tensor, inputs: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Return y and every gradient by name."""
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype))
    return dict(zip(NAMES, [y.detach(), *gradients], strict=False))


def check(given: Problem, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Judge y and every gradient of a backend by the 1.5x rule; return them."""
    own = given.inputs()
    actual = results(fused(given, own, backend), own, given.dy)
    judge(given, actual, dtype)
    return actual


def judge(given: Problem, actual: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Assert by the 1.5x rule that y and the gradients in ``actual`` are right."""
    wide = given.inputs(torch.float64)
    exact = results(eager(given, wide), wide, given.dy)
    narrow = given.inputs(dtype)
    device = given.dy.device
    same_dtype = eager_forms(lambda: results(eager(given, narrow), narrow, given.dy), device)
    same_dtype += [eager_in_another_order(given, dtype, order) for order in range(OTHER_ORDERS)]
    for name, value in actual.items():
        judged = [each[name].view(value.shape) for each in same_dtype]
        assert_as_accurate_as_eager(name, value, judged, exact[name], dtype)
