"""The ticket kernel of ``kernels.py`` for Hopper: x, w and y move by TMA.

    y = x wᵀ + bias + keep * (s bᵀ)      with  s = c · (keep * x) aᵀ,  rounded to the dtype of x

The same work items in the same order under the same flags, but that a row block of s is made in
parts of BLOCK_P rows by several programs. x (twice: for either size of block), w and y come as
tensor descriptors: one thread moves a whole block, past the ends it reads zeros and writes nothing,
and no register holds an address. s and the flags keep plain loads and stores: a flag's release
orders no TMA.

The descriptor of w is over its storage, [N, K] in the forward direction and [K, N] in the backward
one (K_INNER says which); the tensor cores take both. y is stored in column slices, so that a slice
and not the tile waits in shared memory and in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import grouped_tile, keep_mask, load_scale, multiply_add
from peft_kernels.lora.kernels import _halves


@triton.jit
def _low_rank_block(
    rows_desc, a_ptr, s_ptr, seed_ptr, factor, M, K, R, stride_ar, stride_ak, pid_p, pid_r,
    drop_threshold, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store s[rows, r block] = factor · (keep * x) aᵀ of BLOCK_P rows."""
    offs_m = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_r = offs_r < R
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = rows_desc.load([pid_p * BLOCK_P, k])
        a = tl.load(a_ptrs, mask=(offs_k < K - k)[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT == 1:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, offs_m, k // 4, tl.cdiv(K, 4), drop_threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = multiply_add(x, a, acc, PRECISION)
        a_ptrs += BLOCK_K * stride_ak
    s = (acc * factor).to(s_ptr.dtype.element_ty)
    s_ptrs = s_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(s_ptrs, s, mask=(offs_m < M)[:, None] & mask_r[None, :])


@triton.jit
def _quarters(acc):
    """Return the four quarters of the columns, without leaving the registers."""
    left, right = _halves(acc)
    return _halves(left) + _halves(right)


@triton.jit
def _base_product(
    x_desc, w_desc, bias_ptr, first_m, first_n, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_INNER: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x wᵀ + bias of one tile, [BLOCK_M, BLOCK_N], in float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        # Loaded while the first blocks of x and w are on their way.
        offs_n = first_n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([first_m, k])
        if K_INNER:
            w = w_desc.load([first_n, k]).T
        else:
            w = w_desc.load([k, first_n])
        acc = multiply_add(x, w, acc, PRECISION)
    return acc


@triton.jit
def _wait(flag_ptr, expected):
    """Return when all of a row block of s is stored."""
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < expected:
        pass
    tl.debug_barrier()


@triton.jit
def _load_s(s_ptr, offs_m, offs_r, M, R):
    # Not from L1: another program stored it during this launch.
    return tl.load(
        s_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :],
        mask=(offs_m < M)[:, None] & (offs_r < R)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def _load_b(b_ptr, offs_n, offs_r, N, R, stride_bn, stride_br):
    return tl.load(
        b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
        mask=(offs_r < R)[:, None] & (offs_n < N)[None, :],
        other=0.0,
    )


@triton.jit
def _add_low_rank(
    acc, s, b, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + s[m block] b[n block]ᵀ; the first BLOCK_R ranks of both are loaded already."""
    acc = multiply_add(s, b, acc, PRECISION)
    for r in tl.range(BLOCK_R, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s = _load_s(s_ptr, offs_m, offs_r, M, R)
        b = _load_b(b_ptr, offs_n, offs_r, N, R, stride_bn, stride_br)
        acc = multiply_add(s, b, acc, PRECISION)
    return acc


@triton.jit
def _store_masked_slice(
    acc, y_desc, s, s_ptr, b_ptr, seed, first_m, first_n, M, N, R, stride_bn, stride_br,
    drop_threshold, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store acc + keep * (s bᵀ) for COLUMNS columns of a tile."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, COLUMNS)
    b = _load_b(b_ptr, offs_n, tl.arange(0, BLOCK_R), N, R, stride_bn, stride_br)
    low = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    low = _add_low_rank(
        low, s, b, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br, BLOCK_R, PRECISION
    )
    keep = keep_mask(seed, offs_m, first_n // 4, tl.cdiv(N, 4), drop_threshold, COLUMNS)
    acc += tl.where(keep, low, 0.0)
    y_desc.store([first_m, first_n], acc.to(y_desc.dtype))


@triton.jit(do_not_specialize=["drop_threshold"])
def _lora_ticket_tma_kernel(
    x_desc, rows_desc, w_desc, y_desc, a_ptr, b_ptr, bias_ptr, s_ptr, seed_ptr, counters_ptr,
    scale, inverse_keep, M, N, K, R, stride_ar, stride_ak, stride_bn, stride_br, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUP_M: tl.constexpr, K_INNER: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr, PRECISION: tl.constexpr,
    THREADS: tl.constexpr, LOW_RANK_STAGES: tl.constexpr, SLICES: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """Any one-dimensional grid; counters: [ticket, programs done, one flag per row block].

    SLICES is how many parts a tile is stored in: 2, or 4 or 8 where DROPOUT is 2. EIGHTS says that
    the rank is a multiple of 8 but not of 16, which the compiler would tell by itself, and the
    pitch of b (1) or of a (2) too: their rows are read 16 bytes at a time.
    """
    if EIGHTS > 0:
        R = R // 8 * 8
    if EIGHTS == 1:
        stride_bn = stride_bn // 8 * 8
    if EIGHTS == 2:
        stride_ak = stride_ak // 8 * 8
    num_m, num_n, num_r = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    PARTS: tl.constexpr = BLOCK_M // BLOCK_P
    num_p = tl.cdiv(M, BLOCK_P)
    producers = num_p * num_r
    total = producers + num_m * num_n
    flags_ptr = counters_ptr + 2
    thread = tl.arange(0, THREADS)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < total:
        if ticket < producers:
            pid_p, pid_r = ticket // num_r, ticket % num_r
            factor = load_scale(scale, SCALE_IS_POINTER) * inverse_keep
            _low_rank_block(
                rows_desc, a_ptr, s_ptr, seed_ptr, factor, M, K, R, stride_ar, stride_ak,
                pid_p, pid_r, drop_threshold, BLOCK_P, BLOCK_K, BLOCK_R, LOW_RANK_STAGES,
                DROPOUT, PRECISION,
            )  # fmt: skip
            # Every thread's part of s is stored before one thread releases the flag.
            tl.debug_barrier()
            tl.atomic_add(flags_ptr + pid_p // PARTS, 1, sem="release")
            coming = tl.atomic_add(counters_ptr + thread, 1, mask=thread == 0, sem="relaxed")
        else:
            # The next ticket travels while the tile is worked on: one thread asks and nobody waits,
            # as all would for a scalar. It comes after a consumer's, so no producer lies waiting.
            coming = tl.atomic_add(counters_ptr + thread, 1, mask=thread == 0, sem="relaxed")
            pid_m, pid_n = grouped_tile(ticket - producers, num_m, num_n, GROUP_M)
            first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
            offs_m = first_m + tl.arange(0, BLOCK_M)
            offs_r = tl.arange(0, BLOCK_R)
            expected = min(num_p - pid_m * PARTS, PARTS) * num_r
            acc = _base_product(
                x_desc, w_desc, bias_ptr, first_m, first_n, N, K,
                BLOCK_M, BLOCK_N, BLOCK_K, K_INNER, HAS_BIAS, PRECISION,
            )  # fmt: skip
            if DROPOUT == 2:
                _wait(flags_ptr + pid_m, expected)
                s = _load_s(s_ptr, offs_m, offs_r, M, R)
                seed = tl.load(seed_ptr)
                left, right = _halves(acc)
                if SLICES == 8:
                    slices = _quarters(left) + _quarters(right)
                else:
                    slices = _halves(left) + _halves(right)
                for part in tl.static_range(SLICES):
                    _store_masked_slice(
                        slices[part], y_desc, s, s_ptr, b_ptr, seed, first_m,
                        first_n + part * (BLOCK_N // SLICES), M, N, R, stride_bn, stride_br,
                        drop_threshold, BLOCK_M, BLOCK_N // SLICES, BLOCK_R, PRECISION,
                    )  # fmt: skip
            else:
                offs_n = first_n + tl.arange(0, BLOCK_N)
                _wait(flags_ptr + pid_m, expected)
                s = _load_s(s_ptr, offs_m, offs_r, M, R)
                b = _load_b(b_ptr, offs_n, offs_r, N, R, stride_bn, stride_br)
                acc = _add_low_rank(
                    acc, s, b, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br,
                    BLOCK_R, PRECISION,
                )  # fmt: skip
                left, right = _halves(acc)
                y_desc.store([first_m, first_n], left.to(y_desc.dtype))
                y_desc.store([first_m, first_n + BLOCK_N // SLICES], right.to(y_desc.dtype))
        ticket = tl.sum(tl.where(thread == 0, coming, 0))
    done = tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + 1, 0)
        for block in range(0, num_m, 128):
            offs = block + tl.arange(0, 128)
            tl.store(flags_ptr + offs, 0, mask=offs < num_m)
