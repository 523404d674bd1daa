"""Gradients of small factors: sums over all tokens, split, and bitwise the same on every run.

    g0 = v0ᵀ l0   [C0, R]        g1 = v1ᵀ l1   [C1, R]        colsum1 = Σ_m v1   [C1]

``v0`` [M, C0] and ``v1`` [M, C1] are activations or gradients, ``l0``, ``l1`` [M, R] the factors
of low rank beside them; v0 may be under dropout. One launch: a program sums one tile of columns
over one part of the tokens in fp32; the last part of a tile to arrive adds the parts in index order
and rounds once. Each activation is read once per block of ranks, nothing of its size is written,
and no floating-point atomic is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.core import triton_runtime
from peft_kernels.core.device import keep_mask, last_to_arrive
from peft_kernels.core.rng import drop_threshold
from peft_kernels.core.tiles import ReductionTile


@dataclass(frozen=True)
class Factor:
    """One of the two products: ``out[j, i] = Σ_m v[m, i] · low[m, j]`` in any strides of out.

    Attributes:
        v: [M, C], unit inner stride.
        low: [M, R], contiguous.
        out: [C, R] as a view of any strides, or None where this product is not needed.
    """

    v: Tensor
    low: Tensor
    out: Tensor | None


@triton.jit
def _sum_tile(
    v_ptr, low_ptr, out_ptr, colsum_ptr, part_ptr, colsum_part_ptr, counter_ptr, seed_ptr,
    M, C, R, stride_vm, stride_out_c, stride_out_r,
    pid_c, pid_r, pid_split, drop_threshold,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, COLSUM: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    mask_out = mask_c[:, None] & mask_r[None, :]

    blocks = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLITS)
    start = pid_split * blocks * BLOCK_M
    stop = min(M, start + blocks * BLOCK_M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    colsum = tl.zeros((BLOCK_C,), tl.float32)
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        rows = offs_m.to(tl.int64)
        v = tl.load(
            v_ptr + rows[:, None] * stride_vm + offs_c[None, :],
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        if COLSUM:
            colsum += tl.sum(v.to(tl.float32), axis=0)
        if PRODUCT:
            if DROPOUT:
                seed = tl.load(seed_ptr)
                keep = keep_mask(
                    seed, offs_m, pid_c * (BLOCK_C // 4), tl.cdiv(C, 4), drop_threshold, BLOCK_C
                )
                v = tl.where(keep, v, 0.0)
            low = tl.load(
                low_ptr + rows[:, None] * R + offs_r[None, :],
                mask=mask_m[:, None] & mask_r[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
            acc = tl.dot(tl.trans(v), low, acc, input_precision=PRECISION)

    out_ptrs = (
        out_ptr + offs_c.to(tl.int64)[:, None] * stride_out_c + offs_r[None, :] * stride_out_r
    )
    if SPLITS == 1:
        if PRODUCT:
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_out)
        if COLSUM:
            tl.store(colsum_ptr + offs_c, colsum.to(colsum_ptr.dtype.element_ty), mask=mask_c)
    else:
        offs_part = offs_c.to(tl.int64)[:, None] * R + offs_r[None, :]
        size = C.to(tl.int64) * R
        if PRODUCT:
            tl.store(part_ptr + pid_split * size + offs_part, acc, mask=mask_out)
        if COLSUM:
            tl.store(colsum_part_ptr + pid_split * C + offs_c, colsum, mask=mask_c)
        if last_to_arrive(counter_ptr, SPLITS):
            acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
            colsum = tl.zeros((BLOCK_C,), tl.float32)
            for split in range(SPLITS):
                if PRODUCT:
                    acc += tl.load(
                        part_ptr + split * size + offs_part,
                        mask=mask_out,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                if COLSUM:
                    colsum += tl.load(
                        colsum_part_ptr + split * C + offs_c,
                        mask=mask_c,
                        other=0.0,
                        cache_modifier=".cg",
                    )
            if PRODUCT:
                tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_out)
            if COLSUM:
                tl.store(colsum_ptr + offs_c, colsum.to(colsum_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["drop_threshold"])
def _token_reduction_kernel(
    v0_ptr, low0_ptr, out0_ptr, v1_ptr, low1_ptr, out1_ptr, colsum_ptr,
    part0_ptr, part1_ptr, colsum_part_ptr, counters_ptr, seed_ptr,
    M, C0, C1, R, stride_v0m, stride_v1m,
    stride_out0_c, stride_out0_r, stride_out1_c, stride_out1_r, tiles0, drop_threshold,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRODUCT1: tl.constexpr, COLSUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of C0 then of C1, rank blocks, splits of the tokens)."""
    pid_c, pid_r, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    counter_ptr = counters_ptr + pid_c * tl.num_programs(1) + pid_r
    if pid_c < tiles0:
        _sum_tile(
            v0_ptr, low0_ptr, out0_ptr, colsum_ptr, part0_ptr, colsum_part_ptr, counter_ptr,
            seed_ptr, M, C0, R, stride_v0m, stride_out0_c, stride_out0_r,
            pid_c, pid_r, pid_split, drop_threshold,
            SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT, False, True, PRECISION,
        )  # fmt: skip
    elif pid_r == 0:
        _sum_tile(
            v1_ptr, low1_ptr, out1_ptr, colsum_ptr, part1_ptr, colsum_part_ptr, counter_ptr,
            seed_ptr, M, C1, R, stride_v1m, stride_out1_c, stride_out1_r,
            pid_c - tiles0, pid_r, pid_split, drop_threshold,
            SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, False, COLSUM, PRODUCT1, PRECISION,
        )  # fmt: skip
    else:
        _sum_tile(
            v1_ptr, low1_ptr, out1_ptr, colsum_ptr, part1_ptr, colsum_part_ptr, counter_ptr,
            seed_ptr, M, C1, R, stride_v1m, stride_out1_c, stride_out1_r,
            pid_c - tiles0, pid_r, pid_split, drop_threshold,
            SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, False, False, PRODUCT1, PRECISION,
        )  # fmt: skip


def token_reduction(
    first: Factor,
    second: Factor,
    colsum: Tensor | None,
    tile: ReductionTile,
    *,
    seed: Tensor | None,
    dropout_p: float,
    precision: str,
) -> None:
    """Write ``first.out``, ``second.out`` and ``colsum`` (of second.v) in one launch.

    Args:
        first: its v is under the dropout of ``seed``.
        second: no dropout.
        colsum: [C1], or None where it is not needed.
        tile: block sizes.
        seed: int64 [1], or None for no dropout.
        dropout_p: drop probability of ``seed``.
        precision: Triton's input precision of float32 products, "ieee" or "tf32".
    """
    need0, need1 = first.out is not None, second.out is not None
    if not (need0 or need1 or colsum is not None):
        return
    device = first.v.device
    tokens, rank = first.low.shape
    tiles0 = triton.cdiv(first.v.shape[1], tile.block_c) if need0 else 0
    tiles1 = triton.cdiv(second.v.shape[1], tile.block_c) if need1 or colsum is not None else 0
    # Where the second product is not wanted its rank blocks beyond the first have nothing to do.
    rank_blocks = triton.cdiv(rank, tile.block_r) if need0 or need1 else 1
    splits = _splits(tokens, (tiles0 + tiles1) * rank_blocks, tile.block_m, device)

    v0, v1 = first.v, second.v
    out0 = first.out if first.out is not None else v0
    out1 = second.out if second.out is not None else v1
    part0 = part1 = colsum_part = first.low
    if splits > 1:

        def parts(size: int) -> Tensor:
            return torch.empty(splits * size, dtype=torch.float32, device=device)

        part0 = parts(v0.shape[1] * rank if need0 else 0)
        part1 = parts(v1.shape[1] * rank if need1 else 0)
        colsum_part = parts(v1.shape[1] if colsum is not None else 0)
    threshold = drop_threshold(dropout_p) - 2**31
    counters = triton_runtime.counters(device, (tiles0 + tiles1) * rank_blocks)
    _token_reduction_kernel[(tiles0 + tiles1, rank_blocks, splits)](
        v0, first.low, out0, v1, second.low, out1, colsum if colsum is not None else v1,
        part0, part1, colsum_part, counters, seed if seed is not None else counters,
        tokens, v0.shape[1], v1.shape[1], rank, v0.stride(0), v1.stride(0),
        out0.stride(0), out0.stride(1), out1.stride(0), out1.stride(1), tiles0, threshold,
        SPLITS=splits, BLOCK_M=tile.block_m, BLOCK_C=tile.block_c, BLOCK_R=tile.block_r,
        DROPOUT=seed is not None, PRODUCT1=need1, COLSUM=colsum is not None, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


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
