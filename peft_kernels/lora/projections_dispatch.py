"""Runs several LoRA projections of one x on the backend that serves them.

As ``dispatch.py`` does for one projection, whose launchers also serve here: every backend but
Triton runs projection by projection, and so does Triton where it has no grouped launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, extension, triton_runtime
from peft_kernels.core.library import out_variant_op
from peft_kernels.core.operands import as_rows, factors, narrow, packed, rows, wide_dtype, widen
from peft_kernels.lora import cpp, cuda, dispatch, flops, reference


class Projection(NamedTuple):
    """What one projection adds to the common x, in the form that every launcher takes."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    seed: Tensor | None
    scale: float | Tensor
    dropout_p: float


class Gradients(NamedTuple):
    """Where the gradients of one projection go, each where it is not None."""

    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None
    dweight: Tensor | None


class ProjectionsSpec(NamedTuple):
    """What the choice of a backend and of its launches depends on; one entry per projection."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    dropout: tuple[bool, ...]
    one_layout: bool


def forward_each(
    forward: Callable[..., None],
    x: Tensor,
    projections: Sequence[Projection],
    ys: Sequence[Tensor],
    ss: Sequence[Tensor],
) -> None:
    """Write y and s of every projection by the launcher of one."""
    for each, y, s in zip(projections, ys, ss, strict=True):
        forward(x, *each, y, s)


def backward_each(
    backward: Callable[..., None],
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    projections: Sequence[Projection],
    dx: Tensor | None,
    gradients: Sequence[Gradients],
) -> None:
    """Write the gradients that are not None by the launcher of one projection.

    The parts of dX are summed in float32 or wider, and the sum is rounded once.
    """
    total = part = dx
    for index, (dy, s, each, wanted) in enumerate(
        zip(dys, ss, projections, gradients, strict=True)
    ):
        if index == 1 and dx is not None:
            total = dx.to(wide_dtype(dx.dtype))
            part = torch.empty_like(dx)
        weight, lora_a, lora_b, _, seed, scale, dropout_p = each
        backward(dy, x, s, weight, lora_a, lora_b, seed, scale, dropout_p, part, *wanted)
        if index > 0 and total is not None and part is not None:
            total += part
    if dx is not None and total is not None and total is not dx:
        dx.copy_(total)


def _one_by_one(
    name: str,
    forward: Callable[..., None],
    backward: Callable[..., None],
    why_not: Callable[[ProjectionsSpec], str | None],
) -> backends.Backend:
    def plan(spec: ProjectionsSpec) -> str:
        return f"one by one: {len(spec.ranks)} projections"

    return backends.Backend(
        name,
        lambda *args: forward_each(forward, *args),
        lambda *args: backward_each(backward, *args),
        why_not,
        plan,
    )


def _triton_forward(*args: Any) -> None:
    from peft_kernels.lora import projections_launch

    projections_launch.forward(*args)


def _triton_backward(*args: Any) -> None:
    from peft_kernels.lora import projections_launch

    projections_launch.backward(*args)


def _triton_why_not(spec: ProjectionsSpec) -> str | None:
    return triton_runtime.why_not(spec.device, spec.dtype)


def _triton_plan(spec: ProjectionsSpec) -> str:
    from peft_kernels.core import projections_tiles

    return projections_tiles.projections_plan(*spec)


def _cpp_why_not(spec: ProjectionsSpec) -> str | None:
    return extension.why_not_products(spec.dtype)


LORA_PROJECTIONS = backends.Op(
    "lora_projections",
    (
        backends.Backend(
            "triton", _triton_forward, _triton_backward, _triton_why_not, _triton_plan
        ),
        _one_by_one("cuda", cuda.forward, cuda.backward, cuda_library.backend(cuda).why_not),
        _one_by_one("cpp", cpp.forward, cpp.backward, _cpp_why_not),
        _one_by_one("reference", reference.forward, reference.backward, lambda spec: None),
    ),
    ProjectionsSpec,
)


def one_layout(weights: Sequence[Tensor]) -> bool:
    """Return whether all weights are row-major, or none is: one launch addresses them alike."""
    # Without any unit stride they are packed, row-major, before the launch.
    return len({w.stride(1) == 1 or w.stride(0) != 1 for w in weights}) == 1


def _select(
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    backend: str | None,
) -> tuple[backends.Backend, bool]:
    """Return what runs a call, and whether there is nothing to compute."""
    widths = [weight.shape[0] for weight in weights]
    tokens, in_features = ss[0].shape[0], x.shape[-1]
    spec = (
        x.device,
        ss[0].dtype,
        tokens,
        in_features,
        tuple(widths),
        tuple([s.shape[1] for s in ss]),
        tuple([seed is not None for seed in seeds]),
        one_layout(weights),
    )
    empty = not (tokens and in_features and all(widths))
    return backends.select(LORA_PROJECTIONS, spec, backend), empty


def _served(
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *others: Sequence[Any],
) -> list[Projection]:
    """Return the projections in the form that launchers take."""
    biases = [None if bias is None else packed(bias, dtype) for bias in biases]
    kinds = zip(weights, lora_as, lora_bs, biases, *others, strict=True)
    return [Projection(*factors(w, a, b, dtype), *rest) for w, a, b, *rest in kinds]


def run_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    scales: Sequence[float | Tensor],
    dropout_ps: Sequence[float],
    backend: str | None,
    ys: Sequence[Tensor],
    ss: Sequence[Tensor],
) -> None:
    """Choose a backend and write every y [..., N] and s [M, r]; s has the dtype computed in."""
    chosen, empty = _select(x, ss, weights, seeds, backend)
    kinds = (weights, lora_as, lora_bs, biases, seeds, scales, dropout_ps)
    if empty:

        def one(*values: Any) -> None:
            given = (*values[:8], chosen.name, *values[8:])
            dispatch.run_forward(*given)

        forward_each(one, x, list(map(Projection._make, zip(*kinds, strict=True))), ys, ss)
        return
    dtype = ss[0].dtype
    chosen.forward(
        rows(x, dtype),
        _served(dtype, *kinds),
        [y if y.dim() == 2 else y.view(-1, y.shape[-1]) for y in ys],
        ss,
    )


def run_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    scales: Sequence[float | Tensor],
    dropout_ps: Sequence[float],
    backend: str | None,
    places: Sequence[int],
    outputs: Sequence[Tensor],
) -> None:
    """Choose a backend and write the gradients that are needed.

    ``places`` says which the outputs are: 0 that of x, then by kind, as in ``Gradients``, one for
    each projection. An op's schema has no list that is written to and may hold None.
    """
    count = len(ss)
    placed: list[Tensor | None] = [None] * (1 + 4 * count)
    for place, output in zip(places, outputs, strict=True):
        placed[place] = output
    dx = placed[0]
    gradients = [Gradients._make(placed[1 + i :: count]) for i in range(count)]
    chosen, empty = _select(x, ss, weights, seeds, backend)
    kinds = (weights, lora_as, lora_bs, [None] * count, seeds, scales, dropout_ps)
    if empty:

        def one(*values: Any) -> None:
            given = (*values[:9], chosen.name, *values[9:])
            dispatch.run_backward(*given)

        projections = list(map(Projection._make, zip(*kinds, strict=True)))
        backward_each(one, dys, x, ss, projections, dx, gradients)
        return
    dtype = ss[0].dtype
    # Under autocast x and the weights may be wider than what is computed in.
    dx_narrow, served = narrow(dx, dtype), gradients
    trained = any(each.dweight is not None for each in gradients)
    if trained:
        served = [each._replace(dweight=narrow(each.dweight, dtype)) for each in gradients]
    chosen.backward(
        [rows(dy, dtype) for dy in dys],
        rows(x, dtype),
        ss,
        _served(dtype, *kinds),
        as_rows(dx_narrow),
        served,
    )
    widen(dx_narrow, dx)
    for narrowed, each in zip(served, gradients, strict=True) if trained else ():
        widen(narrowed.dweight, each.dweight)


lora_projections_forward = out_variant_op(
    "lora_projections_forward",
    run_forward,
    "(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, Tensor?[] biases, "
    "Tensor?[] seeds, Tensor[] scales, float[] dropout_ps, str? backend, Tensor(a!)[] ys, "
    "Tensor(b!)[] ss) -> ()",
    ("ys", "ss"),
    flops.of_projections_forward,
)
lora_projections_backward = out_variant_op(
    "lora_projections_backward",
    run_backward,
    "(Tensor[] dys, Tensor x, Tensor[] ss, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor?[] seeds, Tensor[] scales, float[] dropout_ps, str? backend, int[] places, "
    "Tensor(a!)[] outputs) -> ()",
    ("outputs",),
    flops.of_projections_backward,
)
