"""Several LoRA projections of one x in Triton: all results in one launch, their dX in one.

    y_g = x w_gᵀ + bias_g + s_g b_gᵀ     with  s_g = c_g · (keep_g * x) a_gᵀ     for g < 4
    dx  = Σ_g dy_g w_g + keep_g * (ds_g a_g)     with  ds_g = c_g · dy_g b_g

Both are ticket kernels as in ``kernels.py``: the first work items produce s (or ds), store it and
release their row block's flag; the rest are output tiles, which wait for that flag only after their
long loop. A forward tile belongs to one projection; the column blocks of all of them lie side by
side, so that a pass over a group of row blocks reads x once for every projection. A tile of dx runs
the loops of all projections into one accumulator and is rounded once.

Without dropout one product makes every s: the rows of all a_g are taken as one matrix, and x is
read once. Under dropout each s is a work item of its own, because the masks differ.

Every projection's tensors come by themselves, in tuples of four; what a work item needs is picked
by its number. Projections that are not there have no columns and rank 0. WEIGHT_ROWS says whether
the weights are row-major (unit stride along K); all are, or none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import grouped_tile, keep_mask, load_scale, multiply_add
from peft_kernels.lora.kernels import (
    _add_low_rank,
    _base_product,
    _halves,
    _low_rank_block,
    _store_tile,
)


@triton.jit
def _pick(group, values):
    """Return values[group] of four, by arithmetic: no branch ends what is known of alignment."""
    low = tl.where(group == 0, values[0], values[1])
    high = tl.where(group == 2, values[2], values[3])
    return tl.where(group < 2, low, high)


@triton.jit
def _locate(index, counts):
    """Return whose ``index`` is where each of four has ``counts``, and which of its own."""
    end0 = counts[0]
    end1 = end0 + counts[1]
    end2 = end1 + counts[2]
    group = (
        (index >= end0).to(tl.int32) + (index >= end1).to(tl.int32) + (index >= end2).to(tl.int32)
    )
    return group, index - _pick(group, (0, end0, end1, end2))


@triton.jit
def _blocks(sizes, BLOCK: tl.constexpr):
    return (
        tl.cdiv(sizes[0], BLOCK), tl.cdiv(sizes[1], BLOCK),
        tl.cdiv(sizes[2], BLOCK), tl.cdiv(sizes[3], BLOCK),
    )  # fmt: skip


@triton.jit
def _factors(scales, inverse_keeps, SCALE_IS_POINTER: tl.constexpr):
    return (
        load_scale(scales[0], SCALE_IS_POINTER) * inverse_keeps[0],
        load_scale(scales[1], SCALE_IS_POINTER) * inverse_keeps[1],
        load_scale(scales[2], SCALE_IS_POINTER) * inverse_keeps[2],
        load_scale(scales[3], SCALE_IS_POINTER) * inverse_keeps[3],
    )


@triton.jit
def _common_low_rank_block(
    x_ptr, a_ptrs, s_ptrs, factors, M, K, ranks, stride_xm, pid_m, pid_r,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store s_g[m block, r block] = factor_g · x a_gᵀ of every g from one pass over x."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c, offs_k = tl.arange(0, COLUMNS), tl.arange(0, BLOCK_K)
    group = offs_c // BLOCK_R
    offs_r = pid_r * BLOCK_R + offs_c % BLOCK_R
    R = _pick(group, ranks)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows = offs_m.to(tl.int64)
    x_block = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    a_block = (_pick(group, a_ptrs) + offs_r * K)[None, :] + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_block, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_block, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        acc = multiply_add(x, a, acc, PRECISION)
        x_block += BLOCK_K
        a_block += BLOCK_K
    s = (acc * _pick(group, factors)[None, :]).to(s_ptrs[0].dtype.element_ty)
    s_block = _pick(group, s_ptrs)[None, :] + rows[:, None] * R[None, :] + offs_r[None, :]
    tl.store(s_block, s, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _finish(counters_ptr, num_m):
    """Set tickets and flags back to zero where this program is the last to end."""
    done = tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + 1, 0)
        for block in range(0, num_m, 128):
            offs = block + tl.arange(0, 128)
            tl.store(counters_ptr + 2 + offs, 0, mask=offs < num_m)


@triton.jit(do_not_specialize=["threshold0", "threshold1", "threshold2", "threshold3"])
def _projections_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, a0_ptr, a1_ptr, a2_ptr, a3_ptr,
    b0_ptr, b1_ptr, b2_ptr, b3_ptr, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr,
    seed0_ptr, seed1_ptr, seed2_ptr, seed3_ptr, counters_ptr,
    scale0, scale1, scale2, scale3, inverse0, inverse1, inverse2, inverse3,
    threshold0, threshold1, threshold2, threshold3, N0, N1, N2, N3, R0, R1, R2, R3,
    stride_w0, stride_w1, stride_w2, stride_w3, M, K, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COMMON_R: tl.constexpr, COLUMNS: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr, BIASES: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Any one-dimensional grid; counters: [ticket, programs done, one flag per row block].

    The product that makes every s has COLUMNS, COMMON_R for each projection. BIASES: bit g says
    whether g has one.
    """
    widths, ranks = (N0, N1, N2, N3), (R0, R1, R2, R3)
    a_ptrs, s_ptrs = (a0_ptr, a1_ptr, a2_ptr, a3_ptr), (s0_ptr, s1_ptr, s2_ptr, s3_ptr)
    num_m, counts_n = tl.cdiv(M, BLOCK_M), _blocks(widths, BLOCK_N)
    num_n = counts_n[0] + counts_n[1] + counts_n[2] + counts_n[3]
    counts_r = _blocks(ranks, BLOCK_R)
    if DROPOUT:
        num_r = counts_r[0] + counts_r[1] + counts_r[2] + counts_r[3]
    else:
        num_r = tl.cdiv(max(max(R0, R1), max(R2, R3)), COMMON_R)
    producers = num_m * num_r
    total = producers + num_m * num_n
    flags_ptr = counters_ptr + 2
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < total:
        if ticket < producers:
            pid_m, pid_r = ticket // num_r, ticket % num_r
            factors = _factors(
                (scale0, scale1, scale2, scale3), (inverse0, inverse1, inverse2, inverse3),
                SCALE_IS_POINTER,
            )  # fmt: skip
            if DROPOUT:
                group, pid_r = _locate(pid_r, counts_r)
                seed_ptr = _pick(group, (seed0_ptr, seed1_ptr, seed2_ptr, seed3_ptr))
                threshold = _pick(group, (threshold0, threshold1, threshold2, threshold3))
                _low_rank_block(
                    x_ptr, _pick(group, a_ptrs), _pick(group, s_ptrs), seed_ptr,
                    _pick(group, factors), M, K, _pick(group, ranks), stride_xm, K, 1,
                    pid_m, pid_r, threshold, BLOCK_M, BLOCK_K, BLOCK_R, 1, PRECISION,
                )  # fmt: skip
            else:
                _common_low_rank_block(
                    x_ptr, a_ptrs, s_ptrs, factors, M, K, ranks, stride_xm, pid_m, pid_r,
                    BLOCK_M, BLOCK_K, COMMON_R, COLUMNS, PRECISION,
                )  # fmt: skip
            # Every thread's part of s is stored before one thread releases the flag.
            tl.debug_barrier()
            tl.atomic_add(flags_ptr + pid_m, 1, sem="release")
        else:
            pid_m, pid_n = grouped_tile(ticket - producers, num_m, num_n, GROUP_M)
            group, pid_n = _locate(pid_n, counts_n)
            N, R = _pick(group, widths), _pick(group, ranks)
            stride_w = _pick(group, (stride_w0, stride_w1, stride_w2, stride_w3))
            offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = _base_product(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                x_ptr, _pick(group, (w0_ptr, w1_ptr, w2_ptr, w3_ptr)), offs_m, offs_n, M, N, K,
                stride_xm, stride_w if WEIGHT_ROWS else 1, 1 if WEIGHT_ROWS else stride_w,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
            while tl.atomic_add(flags_ptr + pid_m, 0, sem="acquire") < num_r:
                pass
            tl.debug_barrier()
            acc = _add_low_rank(
                acc, _pick(group, s_ptrs), _pick(group, (b0_ptr, b1_ptr, b2_ptr, b3_ptr)),
                offs_m, offs_n, M, N, R, R, 1, BLOCK_R, PRECISION,
            )  # fmt: skip
            y_ptr = _pick(group, (y0_ptr, y1_ptr, y2_ptr, y3_ptr))
            if BIASES > 0:
                bias_ptr = _pick(group, (bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr))
                has_bias = ((BIASES >> group) & 1) > 0
                bias = tl.load(bias_ptr + offs_n, mask=(offs_n < N) & has_bias, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            _store_tile(acc, y_ptr, y_ptr, offs_m, offs_n, M, N, False)
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    _finish(counters_ptr, num_m)


@triton.jit
def _store_masked_slice(
    acc, dx_ptr, ds_ptrs, a_ptrs, ranks, seed_ptrs, thresholds, offs_m, first_k, M, K,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store acc + Σ_g keep_g * (ds_g a_g) for COLUMNS columns of a tile."""
    offs_k = first_k + tl.arange(0, COLUMNS)
    for group in tl.range(0, GROUPS, num_stages=1):
        low = tl.zeros((offs_m.shape[0], COLUMNS), tl.float32)
        low = _add_low_rank(
            low, _pick(group, ds_ptrs), _pick(group, a_ptrs), offs_m, offs_k, M, K,
            _pick(group, ranks), 1, K, BLOCK_R, PRECISION,
        )  # fmt: skip
        seed, threshold = tl.load(_pick(group, seed_ptrs)), _pick(group, thresholds)
        keep = keep_mask(seed, offs_m, first_k // 4, tl.cdiv(K, 4), threshold, COLUMNS)
        acc += tl.where(keep, low, 0.0)
    _store_tile(acc, dx_ptr, dx_ptr, offs_m, offs_k, M, K, False)


@triton.jit(do_not_specialize=["threshold0", "threshold1", "threshold2", "threshold3"])
def _projections_gradient_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr,
    a0_ptr, a1_ptr, a2_ptr, a3_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr,
    ds0_ptr, ds1_ptr, ds2_ptr, ds3_ptr, seed0_ptr, seed1_ptr, seed2_ptr, seed3_ptr,
    dx_ptr, counters_ptr,
    scale0, scale1, scale2, scale3, inverse0, inverse1, inverse2, inverse3,
    threshold0, threshold1, threshold2, threshold3, N0, N1, N2, N3, R0, R1, R2, R3,
    stride_w0, stride_w1, stride_w2, stride_w3, stride_dy0, stride_dy1, stride_dy2, stride_dy3,
    M, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, DROPOUT: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr, SCALE_IS_POINTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Any one-dimensional grid; counters: [ticket, programs done, one flag per row block].

    A tile is [BLOCK_M, BLOCK_N] of dx [M, K] and sums over each N in steps of BLOCK_K, as the
    kernels that serve both directions name them; EVEN_K says whether those divide every N.
    """
    depths, ranks = (N0, N1, N2, N3), (R0, R1, R2, R3)
    dy_ptrs, ds_ptrs = (dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr), (ds0_ptr, ds1_ptr, ds2_ptr, ds3_ptr)
    a_ptrs = (a0_ptr, a1_ptr, a2_ptr, a3_ptr)
    strides_dy = (stride_dy0, stride_dy1, stride_dy2, stride_dy3)
    seed_ptrs = (seed0_ptr, seed1_ptr, seed2_ptr, seed3_ptr)
    thresholds = (threshold0, threshold1, threshold2, threshold3)
    num_m, num_k, counts_r = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), _blocks(ranks, BLOCK_R)
    num_r = counts_r[0] + counts_r[1] + counts_r[2] + counts_r[3]
    producers = num_m * num_r
    total = producers + num_m * num_k
    flags_ptr = counters_ptr + 2
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < total:
        if ticket < producers:
            pid_m = ticket // num_r
            group, pid_r = _locate(ticket % num_r, counts_r)
            R = _pick(group, ranks)
            factors = _factors(
                (scale0, scale1, scale2, scale3), (inverse0, inverse1, inverse2, inverse3),
                SCALE_IS_POINTER,
            )  # fmt: skip
            _low_rank_block(
                _pick(group, dy_ptrs), _pick(group, (b0_ptr, b1_ptr, b2_ptr, b3_ptr)),
                _pick(group, ds_ptrs), seed0_ptr, _pick(group, factors), M, _pick(group, depths), R,
                _pick(group, strides_dy), 1, R, pid_m, pid_r, threshold0,
                BLOCK_M, BLOCK_K, BLOCK_R, 0, PRECISION,
            )  # fmt: skip
            # Every thread's part of ds is stored before one thread releases the flag.
            tl.debug_barrier()
            tl.atomic_add(flags_ptr + pid_m, 1, sem="release")
        else:
            pid_m, pid_k = grouped_tile(ticket - producers, num_m, num_k, GROUP_M)
            first_k = pid_k * BLOCK_N
            offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_k = first_k + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for group in tl.range(0, GROUPS, num_stages=1):
                stride_w = _pick(group, (stride_w0, stride_w1, stride_w2, stride_w3))
                acc = _base_product(
                    acc, _pick(group, dy_ptrs), _pick(group, (w0_ptr, w1_ptr, w2_ptr, w3_ptr)),
                    offs_m, offs_k, M, K, _pick(group, depths), _pick(group, strides_dy),
                    1 if WEIGHT_ROWS else stride_w, stride_w if WEIGHT_ROWS else 1,
                    BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
                )  # fmt: skip
            while tl.atomic_add(flags_ptr + pid_m, 0, sem="acquire") < num_r:
                pass
            tl.debug_barrier()
            if DROPOUT:
                QUARTER: tl.constexpr = BLOCK_N // 4
                left, right = _halves(acc)
                slices = _halves(left) + _halves(right)
                for part in tl.static_range(4):
                    _store_masked_slice(
                        slices[part], dx_ptr, ds_ptrs, a_ptrs, ranks, seed_ptrs, thresholds,
                        offs_m, first_k + part * QUARTER, M, K,
                        GROUPS, QUARTER, BLOCK_R, PRECISION,
                    )  # fmt: skip
            else:
                for group in tl.range(0, GROUPS, num_stages=1):
                    acc = _add_low_rank(
                        acc, _pick(group, ds_ptrs), _pick(group, a_ptrs), offs_m, offs_k, M, K,
                        _pick(group, ranks), 1, K, BLOCK_R, PRECISION,
                    )  # fmt: skip
                _store_tile(acc, dx_ptr, dx_ptr, offs_m, offs_k, M, K, False)
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    _finish(counters_ptr, num_m)
