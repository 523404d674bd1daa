"""Small cases and deliberately broken providers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.lora.baselines import EAGER, eager_lora
from bench.lora.cases import LoRACase
from bench.lora.problem import Problem
from bench.measure import Timing
from bench.method import OURS, Case, Forward, Provider
from bench.rows import TIMED, Row
from bench.targets import Figure

SMALL = LoRACase("small", "cpu", 24, 40, 56, 8, 0.0, "float32", True)
DROPPED = replace(SMALL, name="small dropped", dropout_p=0.25)
NARROW = replace(SMALL, name="small bf16", dtype="bfloat16")


def _scaled(problem: Problem, keep: Tensor | None) -> Forward:
    each, p = problem, problem.case.dropout_p
    return lambda: eager_lora(
        each.x, each.weight, each.bias, each.lora_a, each.lora_b, 1.01 * each.scale, p, keep
    )


def _no_scaled_dropout(problem: Problem, keep: Tensor | None) -> Forward:
    """Forget the 1 / (1 - p) of dropout."""
    each, p = problem, problem.case.dropout_p
    scale = each.scale * (1 - p)
    return lambda: eager_lora(
        each.x, each.weight, each.bias, each.lora_a, each.lora_b, scale, p, keep
    )


def _own_mask(problem: Problem, keep: Tensor | None) -> Forward:
    """Draw a mask of its own where one was demanded."""
    return EAGER.build(problem, None)


class _Unwritten(torch.autograd.Function):
    """y right; the gradient of x has a row that is never written."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scale = scale
        return eager_lora(x, weight, bias, lora_a, lora_b, scale, 0.0, None)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, lora_a, lora_b = ctx.saved_tensors
        ds = ctx.scale * (dy @ lora_b)
        dx = torch.empty_like(x)
        dx[:-1] = (dy @ weight + ds @ lora_a)[:-1]
        s = ctx.scale * (x @ lora_a.t())
        return dx, None, None, ds.t() @ x, dy.t() @ s, None


def _unwritten(problem: Problem, keep: Tensor | None) -> Forward:
    each = problem
    return lambda: _Unwritten.apply(
        each.x, each.weight, each.bias, each.lora_a, each.lora_b, each.scale
    )


def _raises(problem: Problem, keep: Tensor | None) -> Forward:
    def forward() -> Tensor:
        raise RuntimeError("no such kernel")

    return forward


def _one_wrong_value(problem: Problem, keep: Tensor | None) -> Forward:
    right = EAGER.build(problem, keep)

    def forward() -> Tensor:
        y = right()
        wrong = torch.zeros_like(y)
        wrong[-1, -1] = 0.01 * float(y.detach().abs().max())
        return y + wrong

    return forward


SCALED = Provider("scaled by 1.01", _scaled)
NO_SCALED_DROPOUT = Provider("dropout unscaled", _no_scaled_dropout)
OWN_MASK = Provider("own mask", _own_mask)
UNWRITTEN = Provider("unwritten row", _unwritten)
RAISES = Provider("raises", _raises)
ONE_WRONG_VALUE = Provider("one wrong value", _one_wrong_value)


def timed_row(
    case: Case, direction: str, ratio_eager: float, ratio_frozen: float | None = None
) -> Row:
    """Return a row of ours with these ratios; its times are the ratio over the frozen layer's."""
    time_ms = ratio_eager if ratio_frozen is None else ratio_frozen
    timing = Timing(time_ms, time_ms, time_ms, time_ms, 9)
    return Row(
        case, direction, OURS, TIMED, timing=timing, ratio_frozen=ratio_frozen,
        ratio_eager=ratio_eager, over="eager",
    )  # fmt: skip


def figure_of(found: list[Figure], *words: str) -> Figure:
    """Return the one figure whose target contains all the words."""
    (one,) = [each for each in found if all(word in each.target for word in words)]
    return one
