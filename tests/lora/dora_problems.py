"""Random DoRA problems, and what peft's own formula makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import dora_linear
from peft_kernels.core import rng
from tests.lora.problems import Problem
from tests.numerics import assert_as_accurate_as_eager

NAMES = ("y", "dx", "dweight", "da", "db", "dmagnitude", "dbias")


def inputs(given: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return fresh leaves: x, weight, A, B, magnitude and bias, where there is one.

    The magnitudes are the norms of the base's rows times 0.5 to 1.5.
    """
    generator = torch.Generator().manual_seed(7)
    stretch = 0.5 + torch.rand(given.weight.shape[0], generator=generator)
    stretch = stretch.to(given.weight.device)
    magnitude = (given.weight.double().norm(dim=1) * stretch).to(given.lora_b.dtype)
    tensors = [given.x, given.weight, given.lora_a, given.lora_b, magnitude]
    tensors += [] if given.bias is None else [given.bias]
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def fused(given: Problem, tensors: list[Tensor], backend: str | None = None) -> Tensor:
    """Return y of the package."""
    seed = given.seed if given.dropout_p else None
    return dora_linear(
        *tensors, scale=given.scale, dropout_p=given.dropout_p, seed=seed, backend=backend
    )


def dense_norm(given: Problem, tensors: list[Tensor]) -> Tensor:
    """Return the norm of the rows of W + scale B A as peft makes it, in the tensors' dtype."""
    _, weight, lora_a, lora_b, *_ = tensors
    weight = weight.to(lora_a.dtype)
    eye = torch.eye(weight.shape[1], dtype=lora_a.dtype, device=weight.device)
    delta = F.linear(F.linear(eye, lora_a), lora_b).T
    return torch.linalg.norm(weight + given.scale * delta, dim=1).detach()


def mask(given: Problem) -> Tensor:
    """Return the keep mask that the seed stands for, in the shape of x."""
    width = given.x.shape[-1]
    return rng.dropout_mask(
        given.seed, given.x.numel() // max(1, width), width, given.dropout_p
    ).view(given.x.shape)


def peft_form(given: Problem, tensors: list[Tensor]) -> Tensor:
    """Return y as ``DoraLinearVariant`` and ``DoraLinearLayer`` of peft write it."""
    x, weight, lora_a, lora_b, magnitude, *rest = tensors
    bias = rest[0].to(x.dtype) if rest else None
    result = F.linear(x, weight, bias)
    g = magnitude / dense_norm(given, tensors)
    # peft casts x, and with dropout the weight, to the dtype of A.
    x = x.to(lora_a.dtype)
    if given.dropout_p:
        x = x * mask(given) / (1.0 - given.dropout_p)
        base = F.linear(x, weight.to(x.dtype))
    else:
        base = result if bias is None else result - bias
    low_rank = F.linear(F.linear(x, lora_a), lora_b)
    return (result + (g - 1) * base + g * low_rank * given.scale).to(result.dtype)


def results(y: Tensor, tensors: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Return y and every gradient by name."""
    gradients = torch.autograd.grad(y, tensors, dy.to(y.dtype))
    return dict(zip(NAMES, [y.detach(), *gradients], strict=False))


def judge(
    given: Problem, actual: dict[str, Tensor], dtype: torch.dtype, *, as_given: bool = False
) -> None:
    """Assert by the 1.5x rule that y and the gradients are as right as peft's in ``dtype``.

    ``as_given`` compares with peft on the tensors as they are given: where A and B are wider than
    x, it computes the low-rank part in their dtype.
    """
    judge_together([given], [actual], dtype, as_given=as_given)


def judge_together(
    problems: Sequence[Problem],
    actual: Sequence[dict[str, Tensor]],
    dtype: torch.dtype,
    *,
    as_given: bool = False,
) -> None:
    """Judge several problems as one: of few numbers a single draw is luck."""
    measures = [_measure(given, dtype, as_given) for given in problems]
    for name in actual[0]:
        found, eager, exact = (
            torch.cat([each[name].flatten() for each in column])
            for column in (actual, *zip(*measures, strict=True))
        )
        if dtype == torch.float64:
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)
        else:
            assert_as_accurate_as_eager(name, found, [eager], exact, dtype)


def _measure(
    given: Problem, dtype: torch.dtype, as_given: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what peft gives in ``dtype``, or in the tensors' own, and what is exact."""
    wide = inputs(given, torch.float64)
    # Exact for the very magnitudes that the narrow call was given.
    wide[4] = inputs(given)[4].detach().double().requires_grad_()
    exact = results(peft_form(given, wide), wide, given.dy)
    eager = inputs(given, None if as_given else dtype)
    return results(peft_form(given, eager), eager, given.dy), exact
