"""LoRA products in Triton: forward in one launch, the gradient of x in one, the factors' in one.

    y = x wᵀ + bias + keep * (s bᵀ)      with  s = c · (keep * x) aᵀ,  rounded to the dtype of x

One kernel serves both directions. Forward: x, W, A, B, the mask on x. Backward: x is dY, w is Wᵀ,
a is Bᵀ, b is Aᵀ, s is dS, y is dX, and the mask acts on dS A. Every operand comes with its strides.

Ticket order. Work items are handed out by an atomic counter. The first ones *produce* a row block
of s, store it and release a flag; the rest are output tiles, which run the whole K loop, then
acquire their row block's flag, load s and chain ``s bᵀ`` into the accumulator. A producer never
waits and every producer is handed out before any consumer, so progress needs no co-residency. The
last program to finish sets tickets and flags back to zero.

Read: x and w once per tile pass (L2), a once per row block, s and b once per tile. Written: y and s
once. Nothing of the size of x is stored for backward; the mask is drawn again from its seed.

DROPOUT says where the mask acts: 0 nowhere, 1 on x (forward), 2 on s bᵀ (backward).
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import grouped_tile, keep_mask, load_scale, multiply_add


@triton.jit
def _low_rank_block(
    x_ptr, a_ptr, s_ptr, seed_ptr, factor, M, K, R, stride_xm, stride_ar, stride_ak,
    pid_m, pid_r, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store s[m block, r block] = factor · (keep * x) aᵀ."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows = offs_m.to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT == 1:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, offs_m, k // 4, tl.cdiv(K, 4), drop_threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = multiply_add(x, a, acc, PRECISION)
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K * stride_ak
    s = (acc * factor).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + rows[:, None] * R + offs_r[None, :], s, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _add_low_rank(
    acc, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + s[m block] b[n block]ᵀ, the ranks in blocks of BLOCK_R."""
    offs_r = tl.arange(0, BLOCK_R)
    rows = offs_m.to(tl.int64)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        mask_r = offs_r < R - r
        # Not from L1: another program stored it during this launch.
        s = tl.load(
            s_ptr + rows[:, None] * R + (r + offs_r)[None, :],
            mask=(offs_m < M)[:, None] & mask_r[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        b = tl.load(
            b_ptr + offs_n[None, :] * stride_bn + (r + offs_r)[:, None] * stride_br,
            mask=mask_r[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
        acc = multiply_add(s, b, acc, PRECISION)
    return acc


@triton.jit
def _store_masked_slice(
    acc, y_ptr, s_ptr, b_ptr, seed, offs_m, first_n, M, N, R, stride_bn, stride_br, drop_threshold,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store acc + keep * (s bᵀ) for COLUMNS columns of a tile."""
    offs_n = first_n + tl.arange(0, COLUMNS)
    low = tl.zeros((offs_m.shape[0], COLUMNS), tl.float32)
    low = _add_low_rank(
        low, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br, BLOCK_R, PRECISION
    )
    keep = keep_mask(seed, offs_m, first_n // 4, tl.cdiv(N, 4), drop_threshold, COLUMNS)
    acc += tl.where(keep, low, 0.0)
    tl.store(
        y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
    )


@triton.jit
def _halves(acc):
    """Return the left and the right half of the columns, without leaving the registers."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    return acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()


@triton.jit
def _store_tile(acc, y_ptr, bias_ptr, offs_m, offs_n, M, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
    )


@triton.jit
def _base_product(
    acc, x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_xm, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + x wᵀ of one tile, [BLOCK_M, BLOCK_N], in float32."""
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end wrap around: their sums are never stored.
    rows = (offs_m % M).to(tl.int64)
    columns = (offs_n % N).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + columns[None, :] * stride_wn
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        acc = multiply_add(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit(do_not_specialize=["drop_threshold"])
def _lora_ticket_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, y_ptr, s_ptr, seed_ptr, counters_ptr,
    scale, inverse_keep, M, N, K, R, stride_xm, stride_wn, stride_wk,
    stride_ar, stride_ak, stride_bn, stride_br, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Any one-dimensional grid; counters: [ticket, programs done, one flag per row block]."""
    num_m, num_n, num_r = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    producers = num_m * num_r
    total = producers + num_m * num_n
    flags_ptr = counters_ptr + 2
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < total:
        if ticket < producers:
            pid_m, pid_r = ticket // num_r, ticket % num_r
            factor = load_scale(scale, SCALE_IS_POINTER) * inverse_keep
            _low_rank_block(
                x_ptr, a_ptr, s_ptr, seed_ptr, factor, M, K, R, stride_xm, stride_ar, stride_ak,
                pid_m, pid_r, drop_threshold, BLOCK_M, BLOCK_K, BLOCK_R, DROPOUT, PRECISION,
            )  # fmt: skip
            # Every thread's part of s is stored before one thread releases the flag.
            tl.debug_barrier()
            tl.atomic_add(flags_ptr + pid_m, 1, sem="release")
        else:
            pid_m, pid_n = grouped_tile(ticket - producers, num_m, num_n, GROUP_M)
            offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = _base_product(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptr, w_ptr, offs_m, offs_n, M, N, K,
                stride_xm, stride_wn, stride_wk, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
            while tl.atomic_add(flags_ptr + pid_m, 0, sem="acquire") < num_r:
                pass
            tl.debug_barrier()
            if DROPOUT == 2:
                seed = tl.load(seed_ptr)
                QUARTER: tl.constexpr = BLOCK_N // 4
                first_n = pid_n * BLOCK_N
                left, right = _halves(acc)
                q0, q1 = _halves(left)
                q2, q3 = _halves(right)
                _store_masked_slice(
                    q0, y_ptr, s_ptr, b_ptr, seed, offs_m, first_n, M, N, R,
                    stride_bn, stride_br, drop_threshold, QUARTER, BLOCK_R, PRECISION,
                )  # fmt: skip
                _store_masked_slice(
                    q1, y_ptr, s_ptr, b_ptr, seed, offs_m, first_n + QUARTER, M, N, R,
                    stride_bn, stride_br, drop_threshold, QUARTER, BLOCK_R, PRECISION,
                )  # fmt: skip
                _store_masked_slice(
                    q2, y_ptr, s_ptr, b_ptr, seed, offs_m, first_n + 2 * QUARTER, M, N, R,
                    stride_bn, stride_br, drop_threshold, QUARTER, BLOCK_R, PRECISION,
                )  # fmt: skip
                _store_masked_slice(
                    q3, y_ptr, s_ptr, b_ptr, seed, offs_m, first_n + 3 * QUARTER, M, N, R,
                    stride_bn, stride_br, drop_threshold, QUARTER, BLOCK_R, PRECISION,
                )  # fmt: skip
            else:
                acc = _add_low_rank(
                    acc, s_ptr, b_ptr, offs_m, offs_n, M, N, R, stride_bn, stride_br,
                    BLOCK_R, PRECISION,
                )  # fmt: skip
                _store_tile(acc, y_ptr, bias_ptr, offs_m, offs_n, M, N, HAS_BIAS)
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    done = tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + 1, 0)
        for block in range(0, num_m, 128):
            offs = block + tl.arange(0, 128)
            tl.store(flags_ptr + offs, 0, mask=offs < num_m)


@triton.jit(do_not_specialize=["drop_threshold"])
def _lora_recompute_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, y_ptr, s_ptr, seed_ptr,
    scale, inverse_keep, M, N, K, R, stride_xm, stride_wn, stride_wk,
    stride_ar, stride_ak, stride_bn, stride_br, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles,): every tile computes its own s; the first of a row block stores it."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    rows = (offs_m % M).to(tl.int64)
    columns = (offs_n % N).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + columns[None, :] * stride_wn
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        acc = multiply_add(x, w, acc, PRECISION)
        if DROPOUT == 1:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, offs_m, k // 4, tl.cdiv(K, 4), drop_threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc_s = multiply_add(x, a, acc_s, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K * stride_ak
    factor = load_scale(scale, SCALE_IS_POINTER) * inverse_keep
    s = (acc_s * factor).to(s_ptr.dtype.element_ty)
    if pid_n == 0:
        tl.store(
            s_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :],
            s,
            mask=(offs_m < M)[:, None] & mask_r[None, :],
        )
    b = tl.load(
        b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
        mask=mask_r[:, None] & (offs_n < N)[None, :],
        other=0.0,
    )
    acc = multiply_add(s, b, acc, PRECISION)
    _store_tile(acc, y_ptr, bias_ptr, offs_m, offs_n, M, N, HAS_BIAS)


@triton.jit(do_not_specialize=["drop_threshold"])
def _low_rank_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, scale, inverse_keep, M, K, R,
    stride_xm, stride_ar, stride_ak, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, SCALE_IS_POINTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, rank blocks): s alone."""
    factor = load_scale(scale, SCALE_IS_POINTER) * inverse_keep
    _low_rank_block(
        x_ptr, a_ptr, s_ptr, seed_ptr, factor, M, K, R, stride_xm, stride_ar, stride_ak,
        tl.program_id(0), tl.program_id(1), drop_threshold,
        BLOCK_M, BLOCK_K, BLOCK_R, DROPOUT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["drop_threshold"])
def _masked_update_kernel(
    y_ptr, s_ptr, b_ptr, seed_ptr, M, N, R, stride_bn, stride_br, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, column blocks): y += keep * (s bᵀ), in place."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    y = tl.load(
        y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :],
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
        other=0.0,
    ).to(tl.float32)
    _store_masked_slice(
        y, y_ptr, s_ptr, b_ptr, tl.load(seed_ptr), offs_m, first_n, M, N, R,
        stride_bn, stride_br, drop_threshold, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
