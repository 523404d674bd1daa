"""What is measured side by side: each provider turns a problem into a forward call.

``build(problem, keep)`` returns a call without arguments that gives y. With ``keep`` None the
provider draws its dropout as its users would; with a mask it applies exactly that one, so that the
numerics gate can compare providers whose random streams differ.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import Problem
from peft_kernels import explain, lora_linear
from peft_kernels.core import tiles

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: what tables show.
        build: from a problem and a dropout mask (or None) to the call that is measured.
        why_not: the reason why this machine or case cannot run it, or None.
        frozen: computes the base layer alone: the floor, not a LoRA.
        around: entered around every call, as for a forced kernel variant.
        plan: how it would run a problem, where it has a choice.
        poison: whether the gate may run it in PyTorch's deterministic mode, which fills fresh
            memory with NaN; a compiled graph would be compiled anew for it.
    """

    name: str
    build: Callable[[Problem, Tensor | None], Forward]
    why_not: Callable[[Problem], str | None] = lambda problem: None
    frozen: bool = False
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    plan: Callable[[Problem], str | None] = lambda problem: None
    poison: bool = True


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
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    if variant is not None:
        around = functools.partial(tiles.forced_variant, variant)

    def arguments(problem: Problem) -> dict[str, Any]:
        return {"scale": problem.scale, "dropout_p": problem.case.dropout_p, "backend": backend}

    def tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return problem.x, problem.weight, problem.lora_a, problem.lora_b, problem.bias

    def build(problem: Problem, keep: Tensor | None) -> Forward:
        given, options = tensors(problem), arguments(problem)
        if keep is not None:
            options["seed"] = problem.seed  # the mask was made from it
        return lambda: lora_linear(*given, **options)

    def why_not(problem: Problem) -> str | None:
        found = explain(lora_linear, *tensors(problem), **arguments(problem))
        if found.backend is None:
            return found.reasons.get(backend or "", str(found))
        return None

    def plan(problem: Problem) -> str | None:
        with around():
            found = explain(lora_linear, *tensors(problem), **arguments(problem))
        return f"{found.backend}: {found.plan}" if found.plan else found.backend

    name = (backend or "fused") + (f":{variant}" if variant else "")
    return Provider(name, build, why_not, around=around, plan=plan)


FROZEN = Provider("frozen", _frozen, frozen=True)
EAGER = Provider("eager", _eager)
FACTORED = Provider("factored", _factored)
COMPILED = Provider("compile", _compiled, poison=False)
BASELINES = (FROZEN, EAGER, FACTORED, COMPILED)
# What a user gets who names no backend.
FUSED = fused()
VARIANTS = tuple(fused("triton", variant) for variant in tiles.VARIANTS)
