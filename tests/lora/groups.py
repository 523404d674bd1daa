"""Random groups of LoRA projections of one x, and what float64 and eager PyTorch make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peft_kernels import lora_linear, lora_projections
from tests.lora.problems import (
    OTHER_ORDERS,
    Problem,
    eager,
    eager_in_another_order,
    problem,
)
from tests.numerics import assert_as_accurate_as_eager, eager_forms

Group = Sequence[Problem]


def group(
    tokens: int | tuple[int, ...],
    in_features: int,
    shapes: Sequence[tuple[int, int]],
    *,
    dropout_p: float | Sequence[float] = 0.0,
    biases: Sequence[bool] | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Problem]:
    """Return one problem for each (out_features, rank), of one x and of scales that differ."""
    ps = dropout_p if isinstance(dropout_p, Sequence) else [dropout_p] * len(shapes)
    every = [
        problem(
            tokens,
            out_features,
            in_features,
            rank,
            dropout_p=p,
            bias=biases is None or biases[index],
            scale=1.5 - 0.25 * index,
            seed=100 * seed + index,
            **options,
        )
        for index, ((out_features, rank), p) in enumerate(zip(shapes, ps, strict=True))
    ]
    return [replace(each, x=every[0].x) for each in every]


def inputs_of(given: Group, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    """Return fresh leaves for each projection, the first of each the same x."""
    every = [each.inputs(dtype) for each in given]
    return [[every[0][0], *own[1:]] for own in every]


def flat(inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return every leaf once, x first."""
    return [inputs[0][0], *(value for own in inputs for value in own[1:])]


def call(
    given: Group, inputs: Sequence[Sequence[Tensor]], backend: str | None = None, **changes: Any
) -> tuple[Tensor, ...]:
    """Return every y of the package's one op."""
    arguments: dict[str, Any] = {
        "x": inputs[0][0],
        "weights": [own[1] for own in inputs],
        "lora_as": [own[2] for own in inputs],
        "lora_bs": [own[3] for own in inputs],
        "biases": [own[4] if len(own) > 4 else None for own in inputs],
        "scales": [each.scale for each in given],
        "dropout_p": [each.dropout_p for each in given],
        "seeds": [each.seed for each in given],
        "backend": backend,
    }
    return lora_projections(**(arguments | changes))


def separate(
    given: Group, inputs: Sequence[Sequence[Tensor]], backend: str | None = None
) -> tuple[Tensor, ...]:
    """Return every y of ``lora_linear``, called for each projection."""
    return tuple(
        lora_linear(
            *own, scale=each.scale, dropout_p=each.dropout_p, seed=each.seed, backend=backend
        )
        for each, own in zip(given, inputs, strict=True)
    )


def results(
    given: Group, ys: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Return dx, and every y and gradient under a name with the projection's number."""
    dys = [each.dy.to(y.dtype) for each, y in zip(given, ys, strict=True)]
    dx, *gradients = torch.autograd.grad(ys, flat(inputs), dys)
    found = {"dx": dx}
    for index, (y, own) in enumerate(zip(ys, inputs, strict=True)):
        found[f"y{index}"] = y.detach()
        for name, _ in zip(("dweight", "da", "db", "dbias"), own[1:], strict=False):
            found[f"{name}{index}"] = gradients.pop(0)
    return found


def run(given: Group, backend: str | None = None) -> dict[str, Tensor]:
    """Return what the op gives, by name."""
    inputs = inputs_of(given)
    return results(given, call(given, inputs, backend), inputs)


def run_separately(given: Group, backend: str | None = None) -> dict[str, Tensor]:
    """Return what separate calls give, by name."""
    inputs = inputs_of(given)
    return results(given, separate(given, inputs, backend), inputs)


def _eager(given: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = inputs_of(given, dtype)
    ys = [eager(each, own) for each, own in zip(given, inputs, strict=True)]
    return results(given, ys, inputs)


def _another_order(given: Group, dtype: torch.dtype, order: int) -> dict[str, Tensor]:
    every = [eager_in_another_order(each, dtype, order) for each in given]
    found = {"dx": sum(each.pop("dx") for each in every)}
    for index, each in enumerate(every):
        found |= {f"{name}{index}": value for name, value in each.items()}
    return found  # type: ignore[return-value]


def check(given: Group, backend: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Judge every result of the op by the 1.5x rule; return them."""
    actual = run(given, backend)
    exact = _eager(given, torch.float64)
    forms = eager_forms(lambda: _eager(given, dtype), given[0].dy.device)
    forms += [_another_order(given, dtype, order) for order in range(OTHER_ORDERS)]
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        judged = [each[name].view(value.shape) for each in forms]
        assert_as_accurate_as_eager(name, value, judged, exact[name], dtype)
    return actual
