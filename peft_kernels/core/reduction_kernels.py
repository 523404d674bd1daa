"""The Triton kernel of ``token_reduction``: sums over all tokens, split, bitwise repeatable.

    g0 = v0ᵀ l0   [C0, R]        lowsum = Σ_m l0   [R]
    g1 = v1ᵀ l1   [C1, R]        colsum = Σ_m v1   [C1]

One launch: a program sums one tile of columns over one part of the tokens in fp32; the last part of
a tile to arrive adds the parts in index order, scales, and rounds once. Each activation is read
once per block of ranks, nothing of its size is written, no floating-point atomic is used. With
PRODUCT_SUMS the sums are products with ones: a sum over threads in each step takes longer, and
needs in registers what tensor cores can read from shared memory.

SCALE says what g1 and colsum are multiplied by, beside inverse_keep: 0 nothing, 1 a number, 2 a
pointer to one, 3 a pointer to one for each column. SCALE_GRAD: 0, 1 the gradient of one number,
2 of one for each column: Σ_j w · g1 + bias · colsum, before scaling.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import keep_mask, last_to_arrive, load_scale, multiply_add


@triton.jit
def _no_sums(COLUMNS: tl.constexpr, BY_PRODUCT: tl.constexpr):
    """Return what ``_add_sums`` starts from."""
    if BY_PRODUCT:
        return tl.zeros((COLUMNS, 16), tl.float32)
    else:
        return tl.zeros((COLUMNS,), tl.float32)


@triton.jit
def _add_sums(block, sums, BY_PRODUCT: tl.constexpr):
    """Return sums + the column sums of a block, in float32."""
    if BY_PRODUCT:
        tl.static_assert(block.dtype != tl.float32, "tensor cores would round what is summed")
        return tl.dot(tl.trans(block), tl.full((block.shape[0], 16), 1.0, block.dtype), sums)
    else:
        return sums + tl.sum(block.to(tl.float32), axis=0)


@triton.jit
def _finished_sums(sums, BY_PRODUCT: tl.constexpr):
    """Return the column sums; those that a product made stand in each of its columns."""
    if BY_PRODUCT:
        return tl.max(sums, axis=1)
    else:
        return sums


@triton.jit
def _store_tile(
    acc, colsum, lowsum, out_ptr, colsum_ptr, lowsum_ptr, w_ptr, bias_ptr, scale, inverse_keep,
    scale_part_ptr, offs_c, offs_r, C, R, stride_out_c, stride_out_r, pid_r,
    COLSUM: tl.constexpr, LOWSUM: tl.constexpr, PRODUCT: tl.constexpr, SCALE: tl.constexpr,
    SCALE_GRAD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store the finished sums of a tile, scaled, and its share of the scale's gradient."""
    mask_c, mask_r = offs_c < C, offs_r < R
    mask_out = mask_c[:, None] & mask_r[None, :]
    if SCALE_GRAD > 0:
        w = tl.load(
            w_ptr + offs_c.to(tl.int64)[:, None] * R + offs_r[None, :], mask=mask_out, other=0.0
        )
        share = tl.sum(acc * w.to(tl.float32), axis=1)
        if HAS_BIAS and COLSUM:
            bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
            share += bias.to(tl.float32) * colsum
        tl.store(scale_part_ptr + pid_r * C + offs_c, share * inverse_keep, mask=mask_c)
    if SCALE == 3:
        factors = tl.load(scale + offs_c, mask=mask_c, other=0.0) * inverse_keep
        acc *= factors[:, None]
        if COLSUM:
            colsum *= factors
    elif SCALE > 0:
        factor = load_scale(scale, SCALE == 2) * inverse_keep
        acc *= factor
        if COLSUM:
            colsum *= factor
    if PRODUCT:
        out_ptrs = (
            out_ptr + offs_c.to(tl.int64)[:, None] * stride_out_c + offs_r[None, :] * stride_out_r
        )
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_out)
    if COLSUM:
        tl.store(colsum_ptr + offs_c, colsum.to(colsum_ptr.dtype.element_ty), mask=mask_c)
    if LOWSUM:
        tl.store(lowsum_ptr + offs_r, lowsum.to(lowsum_ptr.dtype.element_ty), mask=mask_r)


@triton.jit
def _sum_scale_gradient(part_ptr, out_ptr, C, rank_blocks, SCALE_GRAD: tl.constexpr):
    """Store the gradient of the scale from the shares of all tiles, in a fixed order."""
    BLOCK: tl.constexpr = 1024
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for c in range(0, C, BLOCK):
        mask = c + offs < C
        if SCALE_GRAD == 2:
            total = tl.zeros((BLOCK,), tl.float32)
        for block in range(rank_blocks):
            total += tl.load(
                part_ptr + block * C + c + offs, mask=mask, other=0.0, cache_modifier=".cg"
            )
        if SCALE_GRAD == 2:
            tl.store(out_ptr + c + offs, total, mask=mask)
    if SCALE_GRAD == 1:
        tl.store(out_ptr, tl.sum(total, axis=0))


@triton.jit
def _sum_tile(
    v_ptr, low_ptr, out_ptr, colsum_ptr, lowsum_ptr, part_ptr, colsum_part_ptr, lowsum_part_ptr,
    counter_ptr, seed_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr, scale, inverse_keep,
    scale_part_ptr, d_scale_ptr, scale_counter_ptr, scale_tiles,
    M, C, R, stride_vm, stride_out_c, stride_out_r, pid_c, pid_r, pid_split, drop_threshold,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, COLSUM: tl.constexpr, LOWSUM: tl.constexpr, PRODUCT: tl.constexpr,
    SCALE: tl.constexpr, SCALE_GRAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr, PRODUCT_SUMS: tl.constexpr, PRECISION: tl.constexpr,
    WGMMA: tl.constexpr,
):  # fmt: skip
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    mask_out = mask_c[:, None] & mask_r[None, :]

    if GROUPED:
        # The parts are the groups of rows, each with outputs of its own.
        start = tl.load(offsets_ptr + pid_split)
        stop = tl.load(offsets_ptr + pid_split + 1)
        group = pid_split.to(tl.int64)
        out_ptr += group * C * R
        colsum_ptr += group * C
        lowsum_ptr += group * R
    else:
        # There are no more parts than blocks, and none is longer by more than one.
        blocks = tl.cdiv(M, BLOCK_M)
        part, longer = blocks // SPLITS, blocks % SPLITS
        start = (pid_split * part + min(pid_split, longer)) * BLOCK_M
        stop = start + (part + (pid_split < longer).to(tl.int32)) * BLOCK_M
        stop = min(M, stop)
        if DROPOUT and WGMMA:
            # Of a loop that may not run, the assembler makes every product wait for the one before.
            tl.assume(start < stop)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    colsum = _no_sums(BLOCK_C, PRODUCT_SUMS)
    lowsum = _no_sums(BLOCK_R, PRODUCT_SUMS)
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        if GROUPED:
            rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
        else:
            rows = offs_m.to(tl.int64)
        v = tl.load(
            v_ptr + rows[:, None] * stride_vm + offs_c[None, :],
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = keep_mask(
                seed, rows, pid_c * (BLOCK_C // 4), tl.cdiv(C, 4), drop_threshold, BLOCK_C
            )
            v = tl.where(keep, v, 0.0)
        if COLSUM:
            colsum = _add_sums(v, colsum, PRODUCT_SUMS)
        if PRODUCT or LOWSUM:
            low = tl.load(
                low_ptr + rows[:, None] * R + offs_r[None, :],
                mask=mask_m[:, None] & mask_r[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
        if LOWSUM:
            lowsum = _add_sums(low, lowsum, PRODUCT_SUMS)
        if PRODUCT:
            acc = multiply_add(tl.trans(v), low, acc, PRECISION)

    colsum = _finished_sums(colsum, PRODUCT_SUMS)
    lowsum = _finished_sums(lowsum, PRODUCT_SUMS)
    finished = True
    if SPLITS > 1:
        offs_part = offs_c.to(tl.int64)[:, None] * R + offs_r[None, :]
        size = tl.cast(C, tl.int64) * R  # one column is a constant
        if PRODUCT:
            tl.store(part_ptr + pid_split * size + offs_part, acc, mask=mask_out)
        if COLSUM:
            tl.store(colsum_part_ptr + pid_split * C + offs_c, colsum, mask=mask_c)
        if LOWSUM:
            tl.store(lowsum_part_ptr + pid_split * R + offs_r, lowsum, mask=mask_r)
        finished = last_to_arrive(counter_ptr, SPLITS)
    if finished:
        if SPLITS > 1:
            acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
            colsum = tl.zeros((BLOCK_C,), tl.float32)
            lowsum = tl.zeros((BLOCK_R,), tl.float32)
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
                if LOWSUM:
                    lowsum += tl.load(
                        lowsum_part_ptr + split * R + offs_r,
                        mask=mask_r,
                        other=0.0,
                        cache_modifier=".cg",
                    )
        _store_tile(
            acc, colsum, lowsum, out_ptr, colsum_ptr, lowsum_ptr, w_ptr, bias_ptr, scale,
            inverse_keep, scale_part_ptr, offs_c, offs_r, C, R, stride_out_c, stride_out_r, pid_r,
            COLSUM, LOWSUM, PRODUCT, SCALE, SCALE_GRAD, HAS_BIAS,
        )  # fmt: skip
        if SCALE_GRAD > 0:
            if last_to_arrive(scale_counter_ptr, scale_tiles):
                rank_blocks = tl.num_programs(0 if PRODUCT_SUMS else 1)
                _sum_scale_gradient(scale_part_ptr, d_scale_ptr, C, rank_blocks, SCALE_GRAD)


@triton.jit(do_not_specialize=["drop_threshold"])
def _token_reduction_kernel(
    v0_ptr, low0_ptr, out0_ptr, lowsum_ptr, v1_ptr, low1_ptr, out1_ptr, colsum_ptr,
    part0_ptr, lowsum_part_ptr, part1_ptr, colsum_part_ptr, counters_ptr, seed_ptr,
    order_ptr, offsets_ptr, w_ptr, bias_ptr, scale, inverse_keep, scale_part_ptr, d_scale_ptr,
    M, C0, C1, R, stride_v0m, stride_v1m,
    stride_out0_c, stride_out0_r, stride_out1_c, stride_out1_r, tiles0, tiles1, drop_threshold,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRODUCT0: tl.constexpr, LOWSUM: tl.constexpr, PRODUCT1: tl.constexpr,
    COLSUM: tl.constexpr, SCALE: tl.constexpr, SCALE_GRAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr, PRODUCT_SUMS: tl.constexpr, PRECISION: tl.constexpr,
    WGMMA: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of C0 then of C1, rank blocks, splits of the tokens).

    With PRODUCT_SUMS rank blocks come before tiles: those of a tile run side by side and share what
    they read in L2. DROPOUT: -1 nowhere, or which of v0 and v1 it acts on. WGMMA: products are
    those of warp groups, Hopper's, which run beside what follows them.
    """
    RANKS: tl.constexpr = 0 if PRODUCT_SUMS else 1
    pid_c, pid_r, pid_split = tl.program_id(1 - RANKS), tl.program_id(RANKS), tl.program_id(2)
    counter_ptr = counters_ptr + pid_c * tl.num_programs(RANKS) + pid_r
    scale_tiles = tiles1 * tl.num_programs(RANKS)
    scale_counter_ptr = counters_ptr + (tiles0 + tiles1) * tl.num_programs(RANKS)
    if pid_c < tiles0:
        if LOWSUM and pid_c == 0:
            _sum_tile(
                v0_ptr, low0_ptr, out0_ptr, colsum_ptr, lowsum_ptr, part0_ptr, colsum_part_ptr,
                lowsum_part_ptr, counter_ptr, seed_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr,
                scale, inverse_keep, scale_part_ptr, d_scale_ptr, scale_counter_ptr, scale_tiles,
                M, C0, R, stride_v0m, stride_out0_c, stride_out0_r,
                pid_c, pid_r, pid_split, drop_threshold,
                SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT == 0, False, True, PRODUCT0,
                0, 0, False, GROUPED, PRODUCT_SUMS, PRECISION, WGMMA,
            )  # fmt: skip
        elif PRODUCT0:
            _sum_tile(
                v0_ptr, low0_ptr, out0_ptr, colsum_ptr, lowsum_ptr, part0_ptr, colsum_part_ptr,
                lowsum_part_ptr, counter_ptr, seed_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr,
                scale, inverse_keep, scale_part_ptr, d_scale_ptr, scale_counter_ptr, scale_tiles,
                M, C0, R, stride_v0m, stride_out0_c, stride_out0_r,
                pid_c, pid_r, pid_split, drop_threshold,
                SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT == 0, False, False, PRODUCT0,
                0, 0, False, GROUPED, PRODUCT_SUMS, PRECISION, WGMMA,
            )  # fmt: skip
    elif pid_r == 0:
        _sum_tile(
            v1_ptr, low1_ptr, out1_ptr, colsum_ptr, lowsum_ptr, part1_ptr, colsum_part_ptr,
            lowsum_part_ptr, counter_ptr, seed_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr,
            scale, inverse_keep, scale_part_ptr, d_scale_ptr, scale_counter_ptr, scale_tiles,
            M, C1, R, stride_v1m, stride_out1_c, stride_out1_r,
            pid_c - tiles0, pid_r, pid_split, drop_threshold,
            SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT == 1, COLSUM, False, PRODUCT1,
            SCALE, SCALE_GRAD, HAS_BIAS, GROUPED, PRODUCT_SUMS, PRECISION, WGMMA,
        )  # fmt: skip
    elif PRODUCT1:
        _sum_tile(
            v1_ptr, low1_ptr, out1_ptr, colsum_ptr, lowsum_ptr, part1_ptr, colsum_part_ptr,
            lowsum_part_ptr, counter_ptr, seed_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr,
            scale, inverse_keep, scale_part_ptr, d_scale_ptr, scale_counter_ptr, scale_tiles,
            M, C1, R, stride_v1m, stride_out1_c, stride_out1_r,
            pid_c - tiles0, pid_r, pid_split, drop_threshold,
            SPLITS, BLOCK_M, BLOCK_C, BLOCK_R, DROPOUT == 1, False, False, PRODUCT1,
            SCALE, SCALE_GRAD, HAS_BIAS, GROUPED, PRODUCT_SUMS, PRECISION, WGMMA,
        )  # fmt: skip
