"""LoRA's providers: each turns a problem into a forward call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lora.problem import Problem
from bench.method import COMPILED as COMPILED_NAME
from bench.method import Forward, Provider, packaged
from peft_kernels import lora_linear
from peft_kernels.core import lora_tiles


def drop(x: Tensor, p: float, keep: Tensor | None) -> Tensor:
    """Return dropout of x [M, K]: by the mask ``keep`` where there is one, else freshly drawn."""
    if p == 0.0:
        return x
    if keep is None:
        return F.dropout(x, p)
    return torch.where(keep, x, 0.0) * (1.0 / (1.0 - p))


def eager_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    scale: float, p: float, keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return y in peft's form: base + B(A(drop(x))) * scale, each product its own call."""
    base = F.linear(x, weight, bias)
    return base + F.linear(F.linear(drop(x, p, keep), lora_a), lora_b) * scale


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the base layer's y: what no LoRA of the same layer can beat by much."""
    return F.linear(x, weight, bias)


class FactoredLoRA(torch.autograd.Function):
    """Three library GEMMs, the rank-r update accumulated in place (Unsloth's and axolotl's form).

    Dropout happens outside, so that ``dropped`` is x itself or another tensor of its size; both
    are saved where they differ.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None,
        lora_a: Tensor, lora_b: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        """Return y [M, N]."""
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        s = dropped @ lora_a.t()  # [M, r]
        y.addmm_(s, lora_b.t(), alpha=scale)
        ctx.save_for_backward(dropped, s, weight, lora_a, lora_b)
        ctx.scale, ctx.same = scale, dropped is x
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, lora_a and lora_b."""
        dropped, s, weight, lora_a, lora_b = ctx.saved_tensors
        ds = (dy @ lora_b).mul_(ctx.scale)  # [M, r]
        dx = dy @ weight
        if ctx.same:
            dx.addmm_(ds, lora_a)
            d_dropped = None
        else:
            d_dropped = ds @ lora_a
        da = ds.t() @ dropped
        db = (dy.t() @ s).mul_(ctx.scale)
        return dx, d_dropped, None, None, da, db, None


def _eager(problem: Problem, keep: Tensor | None) -> Forward:
    each, p = problem, problem.case.dropout_p
    return lambda: eager_lora(
        each.x, each.weight, each.bias, each.lora_a, each.lora_b, each.scale, p, keep
    )


def _frozen(problem: Problem, keep: Tensor | None) -> Forward:
    return lambda: frozen_linear(problem.x, problem.weight, problem.bias)


def _factored(problem: Problem, keep: Tensor | None) -> Forward:
    each, p = problem, problem.case.dropout_p

    def forward() -> Tensor:
        dropped = drop(each.x, p, keep)
        y: Tensor = FactoredLoRA.apply(
            each.x, dropped, each.weight, each.bias, each.lora_a, each.lora_b, each.scale
        )
        return y

    return forward


def _compiled(problem: Problem, keep: Tensor | None) -> Forward:
    # Compiled graphs of other shapes count towards dynamo's limit of recompilations.
    torch._dynamo.reset()
    compiled = torch.compile(eager_lora, dynamic=False)
    each, p = problem, problem.case.dropout_p
    return lambda: compiled(
        each.x, each.weight, each.bias, each.lora_a, each.lora_b, each.scale, p, keep
    )


def fused(backend: str | None = None, variant: str | None = None) -> Provider:
    """Return the provider of ``lora_linear`` on a backend (None: the best), on a kernel variant."""

    def arguments(
        problem: Problem, keep: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        each = problem
        options: dict[str, Any] = {"scale": each.scale, "dropout_p": each.case.dropout_p}
        if keep is not None:
            options["seed"] = each.seed  # the mask was made from it
        return (each.x, each.weight, each.lora_a, each.lora_b, each.bias), options

    return packaged(lora_linear, arguments, backend, variant)


FROZEN = Provider("frozen", _frozen, frozen=True)
EAGER = Provider("eager", _eager)
FACTORED = Provider("factored", _factored)
COMPILED = Provider(COMPILED_NAME, _compiled, poison=False)
BASELINES = (FROZEN, EAGER, FACTORED, COMPILED)
FUSED = fused()
VARIANTS = tuple(fused("triton", variant) for variant in lora_tiles.VARIANTS)
