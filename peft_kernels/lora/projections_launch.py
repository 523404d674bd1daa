"""Launchers of several LoRA projections of one x: grouped where there is a tile, else one by one.

``remembered`` sees tensors among a launcher's arguments, not inside of them: what it wraps here
takes every projection's tensors and numbers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from peft_kernels.core import lora_tiles, projections_tiles, tiles
from peft_kernels.core.launches import counters, launch, remembered
from peft_kernels.core.lora_tiles import LoRATile
from peft_kernels.core.rng import drop_threshold
from peft_kernels.core.token_reduction import Factor, token_reduction
from peft_kernels.lora import launch as single
from peft_kernels.lora import projections_kernels
from peft_kernels.lora.projections_dispatch import (
    Gradients,
    Projection,
    backward_each,
    forward_each,
    one_layout,
)

MOST = projections_tiles.MOST
_FIELDS = len(Projection._fields)


def forward(
    x: Tensor, projections: Sequence[Projection], ys: Sequence[Tensor], ss: Sequence[Tensor]
) -> None:
    """Write every y [M, N] and s [M, r]: up to four of them in one launch, or one by one."""
    _forward(x, *ys, *ss, *_flat(projections))


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    projections: Sequence[Projection],
    dx: Tensor | None,
    gradients: Sequence[Gradients],
) -> None:
    """Write the gradients that are not None: dX of up to four in one launch, the rest one by one.

    The parts of dX of more than four are summed in float32, and the sum is rounded once.
    """
    _backward(x, dx, *dys, *ss, *_flat(gradients), *_flat(projections))


def _flat(records: Sequence[Projection | Gradients]) -> list[Any]:
    return [value for each in records for value in each]


@remembered
def _forward(x: Tensor, *values: Any) -> None:
    """Serve ``forward``; values: every y, every s, every projection's."""
    count = len(values) // (2 + _FIELDS)
    ys, ss = values[:count], values[count : 2 * count]
    projections = _projections(values[2 * count :])
    tile = _forward_tile(x, projections)
    if count == 1 or isinstance(tile, str):
        forward_each(single.lora_forward, x, projections, ys, ss)
        return
    with torch.cuda.device_of(x):
        for first in range(0, count, MOST):
            some = slice(first, first + MOST)
            _launch_forward(x, ys[some], ss[some], projections[some], tile)


@remembered
def _backward(x: Tensor, dx: Tensor | None, *values: Any) -> None:
    """Serve ``backward``; values: every dy, every s, every projection's gradients, and its own."""
    count = len(values) // (2 + len(Gradients._fields) + _FIELDS)
    dys, ss = values[:count], values[count : 2 * count]
    ends = len(values) - count * _FIELDS
    gradients = [Gradients(*values[i : i + 4]) for i in range(2 * count, ends, 4)]
    projections = _projections(values[ends:])
    tile = _gradient_tile(dys, x, projections)
    if count == 1 or dx is None or isinstance(tile, str):
        backward_each(single.lora_backward, dys, x, ss, projections, dx, gradients)
        return
    with torch.cuda.device_of(x):
        dss = [torch.empty_like(s) for s in ss]
        total = dx if count <= MOST else torch.zeros_like(dx, dtype=torch.float32)
        part = dx if count <= MOST else torch.empty_like(total)
        for first in range(0, count, MOST):
            some = slice(first, first + MOST)
            _launch_gradient(part, dys[some], dss[some], projections[some], tile)
            if part is not total:
                total += part
        if total is not dx:
            dx.copy_(total)
        for dy, s, ds, each, wanted in zip(dys, ss, dss, projections, gradients, strict=True):
            token_reduction(
                Factor(x, ds, None if wanted.da is None else wanted.da.t()),
                Factor(dy, s, wanted.db),
                wanted.dbias,
                tiles.reduction_tile(x.device, x.dtype, s.shape[1]),
                seed=each.seed,
                dropout_p=each.dropout_p,
                precision=tiles.precision(x.dtype, x.device),
            )
            if wanted.dweight is not None:
                torch.mm(dy.t(), x, out=wanted.dweight)


def _projections(values: Sequence[Any]) -> list[Projection]:
    return [Projection(*values[i : i + _FIELDS]) for i in range(0, len(values), _FIELDS)]


def _forward_tile(x: Tensor, projections: Sequence[Projection]) -> LoRATile | str:
    dropped = any(each.seed is not None for each in projections)
    return projections_tiles.projections_tile(
        x.device,
        x.dtype,
        x.shape[0],
        max(each.lora_a.shape[0] for each in projections),
        "dropped" if dropped else "forward",
        all(single._aligned(x, each.weight) for each in projections),
        one_layout([each.weight for each in projections]),
        x.shape[0] * x.shape[1] * sum(each.weight.shape[0] for each in projections),
    )


def _gradient_tile(
    dys: Sequence[Tensor], x: Tensor, projections: Sequence[Projection]
) -> LoRATile | str:
    masked = any(each.seed is not None for each in projections)
    return projections_tiles.projections_tile(
        x.device,
        x.dtype,
        x.shape[0],
        max(each.lora_a.shape[0] for each in projections),
        "masked" if masked else "backward",
        all(
            single._aligned(dy, each.weight.t()) for dy, each in zip(dys, projections, strict=True)
        ),
        one_layout([each.weight for each in projections]),
        x.shape[0] * x.shape[1] * sum(each.weight.shape[0] for each in projections),
    )


def _launch_forward(
    x: Tensor,
    ys: Sequence[Tensor],
    ss: Sequence[Tensor],
    projections: Sequence[Projection],
    tile: LoRATile,
) -> None:
    arguments = _arguments(x, projections, tile)
    ranks = [s.shape[1] for s in ss]
    common = projections_tiles.common_ranks(max(ranks), len(ranks))
    num_r = triton.cdiv(max(ranks), common)
    if arguments["DROPOUT"]:
        num_r = sum(triton.cdiv(rank, arguments["BLOCK_R"]) for rank in ranks)
    num_m = triton.cdiv(x.shape[0], tile.block_m)
    num_n = sum(triton.cdiv(y.shape[1], tile.block_n) for y in ys)
    biases = [each.bias for each in projections]
    # Never read where there is none, but a kernel argument has to be some pointer.
    some_bias = projections[0].lora_b
    launch(
        projections_kernels._projections_kernel,
        (min(num_m * (num_n + num_r), single._resident_programs(x.device)),),
        **arguments,
        **_four("y{}_ptr", ys),
        **_four("s{}_ptr", ss),
        **_four("bias{}_ptr", [some_bias if bias is None else bias for bias in biases]),
        x_ptr=x,
        stride_xm=x.stride(0),
        counters_ptr=counters(x.device, 2 + num_m),
        COMMON_R=common,
        COLUMNS=common * triton.next_power_of_2(len(ranks)),
        BIASES=sum(1 << i for i, bias in enumerate(biases) if bias is not None),
        EVEN_K=x.shape[1] % tile.block_k == 0,
        M=x.shape[0],
    )


def _launch_gradient(
    dx: Tensor,
    dys: Sequence[Tensor],
    dss: Sequence[Tensor],
    projections: Sequence[Projection],
    tile: LoRATile,
) -> None:
    # dx may be wider than what is computed in.
    arguments = _arguments(dys[0], projections, tile)
    num_m = triton.cdiv(dx.shape[0], tile.block_m)
    num_k = triton.cdiv(dx.shape[1], tile.block_n)
    num_r = sum(triton.cdiv(ds.shape[1], arguments["BLOCK_R"]) for ds in dss)
    launch(
        projections_kernels._projections_gradient_kernel,
        (min(num_m * (num_k + num_r), single._resident_programs(dx.device)),),
        **arguments,
        **_four("dy{}_ptr", dys),
        **_four("ds{}_ptr", dss),
        **_four("stride_dy{}", [dy.stride(0) for dy in dys]),
        dx_ptr=dx,
        counters_ptr=counters(dx.device, 2 + num_m),
        GROUPS=len(dys),
        EVEN_K=all(dy.shape[1] % tile.block_k == 0 for dy in dys),
        M=dx.shape[0],
    )


def _arguments(like: Tensor, projections: Sequence[Projection], tile: LoRATile) -> dict[str, Any]:
    """Return what both grouped launches take."""
    weights = [each.weight for each in projections]
    row_major = weights[0].stride(1) == 1
    seeds = [each.seed for each in projections]
    some_seed = next((seed for seed in seeds if seed is not None), None)
    # Never read without dropout, but a kernel argument has to be some pointer.
    other = projections[0].lora_a if some_seed is None else some_seed
    rank = max(each.lora_a.shape[0] for each in projections)
    return {
        **_four("w{}_ptr", weights),
        **_four("a{}_ptr", [each.lora_a for each in projections]),
        **_four("b{}_ptr", [each.lora_b for each in projections]),
        **_four("seed{}_ptr", [other if seed is None else seed for seed in seeds]),
        **_four("scale{}", [each.scale for each in projections]),
        **_four("inverse{}", [1.0 / (1.0 - each.dropout_p) for each in projections]),
        **_four("threshold{}", [drop_threshold(each.dropout_p) - 2**31 for each in projections]),
        **_four("stride_w{}", [w.stride(0 if row_major else 1) for w in weights]),
        **_four("N{}", [w.shape[0] for w in weights], 0),
        **_four("R{}", [each.lora_a.shape[0] for each in projections], 0),
        "K": weights[0].shape[1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": lora_tiles.rank_block(rank),
        "GROUP_M": tile.group_m,
        "DROPOUT": some_seed is not None,
        "WEIGHT_ROWS": row_major,
        "SCALE_IS_POINTER": isinstance(projections[0].scale, Tensor),
        "PRECISION": tiles.precision(like.dtype, like.device),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _four(name: str, values: Sequence[Any], missing: Any = None) -> dict[str, Any]:
    """Return four named arguments; those of no projection are ``missing``, or the first's again."""
    values = [*values, *[values[0] if missing is None else missing] * (MOST - len(values))]
    return {name.format(index): value for index, value in enumerate(values)}
