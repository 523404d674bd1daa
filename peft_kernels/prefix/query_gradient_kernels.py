"""Backward of prefix attention in Triton, launch 1: dq, and delta for the launches after it.

    p = e^(s - lse)     dp = keep · dout vᵀ / (1 - p_drop)     ds = p · (dp - delta + dlse)
    delta = Σ_keys p · dp = Σ_d dout · out     dq = scale · Σ_keys ds k

Grid and order as forward. With the lse over all keys at hand the sums over keys split exactly, so
prefix and sequence go their own ways afterwards. Stored: delta - dlse.

Of exact float32 products (EXACT) the roundings of lse and out would be the largest errors of p and
delta: the keys are visited once more before, for delta = Σ p · dp and for Σ p, which should have
been 1 and by which every p is divided (``correction``); dlse stays apart.

Gated, with t = tanh(gate) and delta_p = Σ_prefix p · dp: ds of the prefix is t · p · (dp -
delta_p), delta of the sequence is less by t · delta_p, and dgate is (1 - t²) · Σ_rows delta_p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import keep_mask, multiply, multiply_add, operand
from peft_kernels.prefix.rows_and_keys import (
    block_ranges,
    edge_block,
    load_block,
    load_rows,
    row_tile,
    row_tiles,
    seen_keys,
    store_block,
)
from peft_kernels.prefix.score_kernels import (
    exponential,
    load_lse,
    negated,
    scores,
    tanh,
)


@triton.jit
def _block_of_keys(
    index, q, dout, row_lse, k_ptr, v_ptr, stride_kn, stride_vn, batch, kv_head,
    start, before, whole, whole_blocks, stop, first, last, mask_ptr, stride_mask,
    seed_ptr, rows, column, groups, drop_threshold, score_scale, inverse_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, EDGES: tl.constexpr, BOUNDED: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return (k, p, dp) of one block of keys, from ``start`` on or EDGES."""
    offs = tl.arange(0, BLOCK_N)
    block = start + index
    if EDGES:
        block = edge_block(index, start, before, whole, whole_blocks)
    n = block * BLOCK_N
    k = load_rows(k_ptr, stride_kn, batch, kv_head, n, stop, BLOCK_N, D, BLOCK_D, MASK, TMA)
    v = load_rows(v_ptr, stride_vn, batch, kv_head, n, stop, BLOCK_N, D, BLOCK_D, MASK, TMA)
    s = scores(
        q, k, n + offs, stop, first, last, mask_ptr, stride_mask,
        MASK, BOUNDED, KEY_MASK, PRECISION,
    )  # fmt: skip
    p = exponential(s * score_scale - row_lse[:, None], q)
    dp = multiply(dout, tl.trans(v), PRECISION)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = keep_mask(seed, rows, (column + n) // 4, groups, drop_threshold, BLOCK_N)
        dp = tl.where(keep, dp * inverse_keep, 0.0)
    return k, p, dp


@triton.jit
def _add_row_sums(
    delta, total, q, dout, row_lse, k_ptr, v_ptr, stride_kn, stride_vn, batch, kv_head,
    start, before, whole, whole_blocks, blocks, stop, first, last, mask_ptr, stride_mask,
    seed_ptr, rows, column, groups, drop_threshold, score_scale, inverse_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, EDGES: tl.constexpr, BOUNDED: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return (Σ p · dp, Σ p) of the rows after some blocks of keys."""
    for index in range(blocks):
        _, p, dp = _block_of_keys(
            index, q, dout, row_lse, k_ptr, v_ptr, stride_kn, stride_vn, batch, kv_head,
            start, before, whole, whole_blocks, stop, first, last, mask_ptr, stride_mask,
            seed_ptr, rows, column, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_N, MASK, EDGES, BOUNDED, KEY_MASK, DROPOUT, PRECISION, TMA,
        )  # fmt: skip
        delta += tl.sum(p * dp, axis=1)
        total += tl.sum(p, axis=1)
    return delta, total


@triton.jit
def _add_query_gradient(
    dq, q, dout, row_lse, delta, dlse, factor, k_ptr, v_ptr, stride_kn, stride_vn, batch, kv_head,
    start, before, whole, whole_blocks, blocks, stop, first, last, mask_ptr, stride_mask,
    seed_ptr, rows, column, groups, drop_threshold, score_scale, inverse_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, EDGES: tl.constexpr, BOUNDED: tl.constexpr, KEY_MASK: tl.constexpr,
    DLSE: tl.constexpr, FACTOR: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Return dq / scale after some blocks of keys, each row's p times its factor."""
    for index in range(blocks):
        k, p, dp = _block_of_keys(
            index, q, dout, row_lse, k_ptr, v_ptr, stride_kn, stride_vn, batch, kv_head,
            start, before, whole, whole_blocks, stop, first, last, mask_ptr, stride_mask,
            seed_ptr, rows, column, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_N, MASK, EDGES, BOUNDED, KEY_MASK, DROPOUT, PRECISION, TMA,
        )  # fmt: skip
        ds = dp - delta[:, None]
        if DLSE:
            ds += dlse[:, None]
        ds *= p
        if FACTOR:
            ds *= factor[:, None]
        dq = multiply_add(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def _correction(total):
    """Return 1 / Σ p, 1 of rows with nothing to see."""
    return 1.0 / tl.where(total > 0.0, total, 1.0)


@triton.jit(do_not_specialize=["S", "T", "P", "window", "segments", "steps", "drop_threshold"])
def _prefix_query_gradient_kernel(
    dout_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, mask_ptr, cu_seqlens_ptr,
    gate_ptr, seed_ptr, out_ptr, lse_ptr, prefix_lse_ptr, dq_ptr, delta_ptr, prefix_delta_ptr,
    correction_ptr, prefix_correction_ptr, stride_ob, stride_oh, stride_om,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_pkb, stride_pkh, stride_pkn, stride_pvb, stride_pvh, stride_pvn,
    stride_mask_b, stride_mask,
    S, T, P, kv_heads, group, window, segments, steps, scale, score_scale, inverse_keep,
    drop_threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, RAGGED_P: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, KEY_MASK: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD: tl.constexpr, NEGATE: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_DQ: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Grid (batch · key heads · row tiles,); BLOCK_P and RAGGED_P as in forward."""
    BOUNDED: tl.constexpr = CAUSAL or WINDOW or PACKED
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    DLSE: tl.constexpr = HAS_DLSE and EXACT
    tiles = row_tiles(S, group, BLOCK_M, FOLD)
    pair = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    head, query, row, exists = row_tile(tile, S, group, BLOCK_M, FOLD)
    head = kv_head * group + head
    rows = pair.to(tl.int64) * group * S + row  # of [B, Hq, S]
    padded = tl.cdiv(P, 4) * 4
    groups = (padded + tl.cdiv(T, 4) * 4) // 4

    offs_o = head * stride_oh + query.to(tl.int64) * stride_om
    dout = load_block(dout_ptr + batch * stride_ob, offs_o, exists, D, BLOCK_D, True)
    if GATED or NEED_DQ or EXACT:
        offs_q = head * stride_qh + query.to(tl.int64) * stride_qm
        q = load_block(q_ptr + batch * stride_qb, offs_q, exists, D, BLOCK_D, True)
        q = negated(q, NEGATE)
        if not TMA:
            k_ptr += batch * stride_kb + kv_head * stride_kh
            v_ptr += batch * stride_vb + kv_head * stride_vh
            prefix_k_ptr += batch * stride_pkb + kv_head * stride_pkh
            prefix_v_ptr += batch * stride_pvb + kv_head * stride_pvh
        sample, kv_index = batch.to(tl.int32), kv_head.to(tl.int32)
        owner = tl.where(stride_pkb == 0, 0, sample)
        mask_ptr += batch * stride_mask_b
        row_lse = load_lse(lse_ptr, rows, exists, q)
        first, last = seen_keys(
            query, S, T, window, cu_seqlens_ptr, segments, steps, CAUSAL, WINDOW, PACKED
        )
        start, before, whole, whole_blocks, edges = block_ranges(first, last, BLOCK_N, KEY_MASK)

    prefix_delta = tl.zeros((BLOCK_M,), tl.float32)
    prefix_total = tl.zeros((BLOCK_M,), tl.float32)
    if BLOCK_P > 0 and (GATED or EXACT):
        prefix_row_lse = row_lse
        if GATED:
            prefix_row_lse = load_lse(prefix_lse_ptr, rows, exists, q)
        prefix_delta, prefix_total = _add_row_sums(
            prefix_delta, prefix_total, q, dout, prefix_row_lse, prefix_k_ptr, prefix_v_ptr,
            stride_pkn, stride_pvn, owner, kv_index, 0, 0, 0, 0, tl.cdiv(P, BLOCK_P), P,
            first, last, mask_ptr, 0,
            seed_ptr, rows, 0, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_P, RAGGED_P, False, False, False, DROPOUT, PRECISION, TMA,
        )  # fmt: skip
    if EXACT:
        delta, total = prefix_delta, prefix_total
        if GATED:
            delta, total = prefix_delta * 0.0, prefix_total * 0.0
        if not KEY_MASK:
            delta, total = _add_row_sums(
                delta, total, q, dout, row_lse, k_ptr, v_ptr, stride_kn, stride_vn,
                sample, kv_index, whole, 0, 0, 0, whole_blocks, T, first, last,
                mask_ptr, stride_mask,
                seed_ptr, rows, padded, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_N, False, False, False, False, DROPOUT, PRECISION, TMA,
            )  # fmt: skip
        delta, total = _add_row_sums(
            delta, total, q, dout, row_lse, k_ptr, v_ptr, stride_kn, stride_vn, sample, kv_index,
            start, before, whole, whole_blocks, edges, T, first, last, mask_ptr, stride_mask,
            seed_ptr, rows, padded, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_N, True, True, BOUNDED, KEY_MASK, DROPOUT, PRECISION, TMA,
        )  # fmt: skip
        correction = _correction(total)
        delta *= correction
        tl.store(correction_ptr + rows, correction, mask=exists)
        if GATED:
            prefix_correction = _correction(prefix_total)
            prefix_delta *= prefix_correction
            tl.store(prefix_correction_ptr + rows, prefix_correction, mask=exists)
    else:
        out = load_block(out_ptr, rows * D, exists, D, BLOCK_D, True)
        # Of the same dout as dp: where a row sees few keys, what it lost cancels in dp - delta.
        weight = operand(dout, PRECISION)
        delta = tl.sum(weight.to(tl.float32) * out.to(tl.float32), axis=1)
        correction = tl.full((BLOCK_M,), 1.0, tl.float32)
    prefix_factor = correction
    if GATED:
        tl.store(prefix_delta_ptr + rows, prefix_delta, mask=exists)
        strength = tanh(tl.load(gate_ptr + head))
        if EXACT:
            prefix_factor = strength * prefix_correction
        else:
            delta -= strength * prefix_delta
            prefix_factor = strength * correction
    dlse = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + rows, mask=exists, other=0.0)
        if not EXACT:
            delta -= dlse
    tl.store(delta_ptr + rows, delta, mask=exists)

    if NEED_DQ:
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if BLOCK_P > 0:
            lse_of_prefix, delta_of_prefix = row_lse, delta
            if GATED:
                lse_of_prefix, delta_of_prefix = prefix_row_lse, prefix_delta
            dq = _add_query_gradient(
                dq, q, dout, lse_of_prefix, delta_of_prefix, dlse, prefix_factor,
                prefix_k_ptr, prefix_v_ptr, stride_pkn, stride_pvn, owner, kv_index,
                0, 0, 0, 0, tl.cdiv(P, BLOCK_P), P, first, last, mask_ptr, 0,
                seed_ptr, rows, 0, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_P, RAGGED_P, False, False, False,
                DLSE and not GATED, GATED or EXACT, DROPOUT, PRECISION, TMA,
            )  # fmt: skip
        if not KEY_MASK:
            dq = _add_query_gradient(
                dq, q, dout, row_lse, delta, dlse, correction, k_ptr, v_ptr, stride_kn, stride_vn,
                sample, kv_index, whole, 0, 0, 0, whole_blocks, T, first, last,
                mask_ptr, stride_mask,
                seed_ptr, rows, padded, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_N, False, False, False, False, DLSE, EXACT, DROPOUT, PRECISION,
                TMA,
            )  # fmt: skip
        dq = _add_query_gradient(
            dq, q, dout, row_lse, delta, dlse, correction, k_ptr, v_ptr, stride_kn, stride_vn,
            sample, kv_index, start, before, whole, whole_blocks, edges, T, first, last,
            mask_ptr, stride_mask,
            seed_ptr, rows, padded, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_N, True, True, BOUNDED, KEY_MASK, DLSE, EXACT, DROPOUT, PRECISION,
            TMA,
        )  # fmt: skip
        store_block(dq_ptr, dq * scale, rows * D, exists, D, BLOCK_D)


@triton.jit(do_not_specialize=["B", "S"])
def _gate_gradient_kernel(prefix_delta_ptr, gate_ptr, dgate_ptr, B, heads, S, BLOCK: tl.constexpr):
    """Grid (query heads,): dgate = (1 - tanh²) · Σ delta_p of the head's rows, in a fixed order."""
    head = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for batch in range(B):
        rows = (tl.full((), 0, tl.int64) + batch * heads + head) * S
        for start in range(0, S, BLOCK):
            total += tl.load(
                prefix_delta_ptr + rows + start + offs, mask=start + offs < S, other=0.0
            )
    strength = tanh(tl.load(gate_ptr + head))
    tl.store(dgate_ptr + head, (1.0 - strength * strength) * tl.sum(total, axis=0))
