"""Gradients of small factors: sums over all tokens, split, and bitwise the same on every run.

    g0 = v0ᵀ l0   [C0, R]        lowsum = Σ_m l0   [R]
    g1 = v1ᵀ l1   [C1, R]        colsum = Σ_m v1   [C1]

``v0`` [M, C0] and ``v1`` [M, C1] are activations or gradients, one of them perhaps under dropout,
``l0``, ``l1`` [M, R] the factors of low rank beside them. g1 and colsum may be scaled, and give the
gradient of that scale: Σ_j w · g1 + bias · colsum. One launch, in ``reduction_kernels``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peft_kernels.core import triton_runtime
from peft_kernels.core.factors import Factor, Groups, Scaling
from peft_kernels.core.launches import counters, launch
from peft_kernels.core.reduction_kernels import _token_reduction_kernel
from peft_kernels.core.rng import drop_threshold
from peft_kernels.core.tiles import ReductionTile, wgmma


def token_reduction(
    first: Factor,
    second: Factor,
    colsum: Tensor | None,
    tile: ReductionTile,
    *,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
    dropped: int = 0,
    lowsum: Tensor | None = None,
    scaling: Scaling | None = None,
    groups: Groups | None = None,
) -> None:
    """Write both products and both sums, each where it is not None, in one launch.

    Args:
        first: one product.
        second: the other.
        colsum: [C1], the column sums of second.v, or None where they are not needed.
        tile: block sizes.
        seed: int64 [1], or None for no dropout.
        dropout_p: drop probability of ``seed``.
        precision: Triton's input precision of float32 products, "ieee" or "tf32".
        dropped: 0 where first.v is under the dropout of ``seed``, 1 where second.v is.
        lowsum: [R], the column sums of first.low, or None.
        scaling: of second.out and colsum, or None.
        groups: sums over groups of rows instead of all; outputs are contiguous and start with
            the groups: second.out is [count, C1, R].
    """
    if scaling is not None and scaling.gradient is not None:
        # The gradient of the scale is made from both, needed or not.
        second, colsum = _complete(second, colsum)
    need0, need1 = first.out is not None, second.out is not None
    if not (need0 or need1 or colsum is not None or lowsum is not None):
        return
    device = first.v.device
    tokens, rank = first.low.shape
    columns0, columns1 = first.v.shape[1], second.v.shape[1]
    # The sums of the low side need one tile of columns.
    tiles0 = triton.cdiv(columns0, tile.block_c) if need0 else int(lowsum is not None)
    tiles1 = triton.cdiv(columns1, tile.block_c) if need1 or colsum is not None else 0
    # Where no product is wanted the rank blocks beyond the first have nothing to do.
    blocked = need0 or need1 or lowsum is not None
    rank_blocks = triton.cdiv(rank, tile.block_r) if blocked else 1
    programs = (tiles0 + tiles1) * rank_blocks
    splits = 1 if groups else _splits(tokens, programs, tile.block_m, device)

    def parts(size: int, wanted: bool = True) -> Tensor:
        return torch.empty(size if wanted else 0, dtype=torch.float32, device=device)

    v0, v1, unused = first.v, second.v, first.low
    out0 = first.out if first.out is not None else v0
    out1 = second.out if second.out is not None else v1
    part0 = part1 = colsum_part = lowsum_part = scale_part = unused
    if splits > 1:
        part0 = parts(splits * columns0 * rank, need0)
        part1 = parts(splits * columns1 * rank, need1)
        colsum_part = parts(splits * columns1, colsum is not None)
        lowsum_part = parts(splits * rank, lowsum is not None)
    gradient = None if scaling is None else scaling.gradient
    if gradient is not None:
        scale_part = parts(rank_blocks * columns1)
    arrivals = counters(device, programs + 1)
    tiles = tiles0 + tiles1
    order = (rank_blocks, tiles) if tile.product_sums else (tiles, rank_blocks)
    launch(
        _token_reduction_kernel, (*order, groups.count if groups else splits),
        v0, first.low, out0, _some(lowsum, unused), v1, second.low, out1, _some(colsum, unused),
        part0, lowsum_part, part1, colsum_part, arrivals, _some(seed, arrivals),
        groups.order if groups else arrivals, groups.offsets if groups else arrivals,
        scaling.weight if scaling else unused, _some(scaling.bias if scaling else None, unused),
        scaling.scale if scaling else 1.0, scaling.inverse_keep if scaling else 1.0,
        scale_part, _some(gradient, unused),
        tokens, columns0, columns1, rank, v0.stride(0), v1.stride(0),
        out0.stride(-2), out0.stride(-1), out1.stride(-2), out1.stride(-1), tiles0, tiles1,
        drop_threshold(dropout_p) - 2**31,
        SPLITS=splits, BLOCK_M=tile.block_m, BLOCK_C=tile.block_c, BLOCK_R=tile.block_r,
        DROPOUT=-1 if seed is None else dropped, PRODUCT0=need0, LOWSUM=lowsum is not None,
        PRODUCT1=need1, COLSUM=colsum is not None, SCALE=scaling.kind() if scaling else 0,
        SCALE_GRAD=0 if gradient is None else 1 if gradient.numel() == 1 else 2,
        HAS_BIAS=scaling is not None and scaling.bias is not None, GROUPED=groups is not None,
        PRODUCT_SUMS=tile.product_sums, PRECISION=precision, WGMMA=wgmma(device),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _complete(second: Factor, colsum: Tensor | None) -> tuple[Factor, Tensor]:
    columns, rank = second.v.shape[1], second.low.shape[1]
    out = second.out if second.out is not None else second.low.new_empty(columns, rank)
    return Factor(second.v, second.low, out), _some(colsum, second.v.new_empty(columns))


def _some(value: Tensor | None, otherwise: Tensor) -> Tensor:
    # What is never read must still be some pointer.
    return otherwise if value is None else value


def _splits(tokens: int, tiles: int, block_m: int, device: torch.device) -> int:
    """Return how many parts the tokens are summed in: enough programs to fill the GPU twice.

    A power of two, so that few variants of the kernel are compiled; a function of the shapes and
    the device alone, so that a run repeats bit for bit.
    """
    wanted = 16 if device.type != "cuda" else 2 * triton_runtime.multiprocessors(device.index or 0)
    most = triton.cdiv(tokens, 2 * block_m)
    splits = 1
    while splits < 64 and splits * tiles < wanted and splits * 2 <= most:
        splits *= 2
    return splits
