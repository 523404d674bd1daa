"""Backward of prefix attention in Triton: dq in one launch, dk and dv in one, the prefix's in one.

    p = e^(s - lse)        dp = keep · dout vᵀ / (1 - p_drop)        ds = p · (dp - delta + dlse)
    dq = scale · Σ_keys ds k        dk = scale · Σ_rows dsᵀ q        dv = Σ_rows (keep · p)ᵀ dout

with delta = Σ dout · out, one number for each row. With the lse over all keys at hand the sums split
exactly by key, so prefix and sequence go their own ways. Launch 1 (grid as forward) makes delta - dlse
and stores it for the others. Launch 2 (batch · key heads · key tiles,) holds a tile of k, v and their
gradients in registers and streams the rows that see it. Launch 3 (prefix tiles, key heads · prefixes,
splits) does the same with the prefix and all rows of all batch rows that share it, split into parts
whose float32 sums the last part to arrive adds in index order: no atomics on numbers, nothing of the
size of a prefix for each batch row.

In float32 (EXACT) the rounding of lse would be the largest error of p: launch 1 sums p over the keys,
and everything is divided by that sum (``correction``), which should have been 1.

Gated, with t = tanh(gate) and delta_p = Σ_prefix p · dp: ds of the prefix is t · p · (dp - delta_p),
delta of the sequence is less by t · delta_p, and dgate is (1 - t²) · Σ_rows delta_p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import keep_mask, last_to_arrive
from peft_kernels.prefix.kernels import LOG2E, exponential, scores
from peft_kernels.prefix.rows_and_keys import (
    block_ranges,
    edge_block,
    load_block,
    negated,
    row_tile,
    row_tiles,
    seeing_queries,
    seen_keys,
    store_block,
    tanh,
)


@triton.jit
def _load_lse(lse_ptr, rows, exists, like):
    """Return lse in the base of the scores; +inf, which makes p 0, of rows with nothing to see."""
    lse = tl.load(lse_ptr + rows, mask=exists, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if like.dtype == tl.float32:
        return lse
    else:
        return lse * LOG2E


@triton.jit
def _prefix_delta(
    q, dout, row_lse, k_ptr, v_ptr, stride_kn, stride_vn, P,
    seed_ptr, rows, groups, drop_threshold, score_scale, inverse_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Σ p · dp of the rows over the prefix, dout · (the prefix's share of out), and Σ p."""
    offs = tl.arange(0, BLOCK_N)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for index in range(tl.cdiv(P, BLOCK_N)):
        n = index * BLOCK_N
        base = n.to(tl.int64)
        exists = n + offs < P
        k = load_block(k_ptr + base * stride_kn, offs * stride_kn, exists, D, BLOCK_D, True)
        v = load_block(v_ptr + base * stride_vn, offs * stride_vn, exists, D, BLOCK_D, True)
        s = scores(q, k, n + offs, P, 0, 0, k_ptr, 0, True, False, False, PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, rows, n // 4, groups, drop_threshold, BLOCK_N)
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        p = exponential(s * score_scale - row_lse[:, None], q)
        delta += tl.sum(p * dp, axis=1)
        if q.dtype == tl.float32:
            total += tl.sum(p, axis=1)
    return delta, total


@triton.jit
def _add_query_gradient(
    dq, total, q, dout, row_lse, delta, factor, k_ptr, v_ptr, stride_kn, stride_vn,
    start, before, whole, whole_blocks, blocks, stop, first, last, mask_ptr, stride_mask,
    seed_ptr, rows, column, groups, drop_threshold, score_scale, inverse_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, EDGES: tl.constexpr, BOUNDED: tl.constexpr, KEY_MASK: tl.constexpr,
    GATED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return (dq / scale, Σ p where EXACT) after some blocks of keys, from ``start`` on or EDGES."""
    offs = tl.arange(0, BLOCK_N)
    for index in range(blocks):
        block = start + index
        if EDGES:
            block = edge_block(index, start, before, whole, whole_blocks)
        n = block * BLOCK_N
        base = n.to(tl.int64)
        exists = n + offs < stop
        k = load_block(k_ptr + base * stride_kn, offs * stride_kn, exists, D, BLOCK_D, MASK)
        v = load_block(v_ptr + base * stride_vn, offs * stride_vn, exists, D, BLOCK_D, MASK)
        s = scores(
            q, k, n + offs, stop, first, last, mask_ptr, stride_mask,
            MASK, BOUNDED, KEY_MASK, PRECISION,
        )  # fmt: skip
        p = exponential(s * score_scale - row_lse[:, None], q)
        if q.dtype == tl.float32:
            total += tl.sum(p, axis=1)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, rows, (column + n) // 4, groups, drop_threshold, BLOCK_N)
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        ds = p * (dp - delta[:, None])
        if GATED:
            ds *= factor[:, None]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, total


@triton.jit
def _correction(total):
    """Return 1 / Σ p, 1 of rows with nothing to see."""
    return 1.0 / tl.where(total > 0.0, total, 1.0)


@triton.jit(
    do_not_specialize=["S", "T", "P", "window", "segments", "steps", "drop_threshold"]
)
def _prefix_query_gradient_kernel(
    dout_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, mask_ptr, cu_seqlens_ptr,
    gate_ptr, seed_ptr, out_ptr, lse_ptr, prefix_lse_ptr, dq_ptr, delta_ptr, prefix_delta_ptr,
    correction_ptr, prefix_correction_ptr, stride_ob, stride_oh, stride_om,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_pkb, stride_pkh, stride_pkn, stride_pvb, stride_pvh, stride_pvn,
    stride_mask_b, stride_mask,
    S, T, P, kv_heads, group, window, segments, steps, scale, score_scale, inverse_keep, drop_threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    KEY_MASK: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    NEGATE: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (batch · key heads · row tiles,); BLOCK_P 0: there is no prefix."""
    BOUNDED: tl.constexpr = CAUSAL or WINDOW or PACKED
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
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
    out = load_block(out_ptr, rows * D, exists, D, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    if GATED or NEED_DQ or EXACT:
        offs_q = head * stride_qh + query.to(tl.int64) * stride_qm
        q = load_block(q_ptr + batch * stride_qb, offs_q, exists, D, BLOCK_D, True)
        q = negated(q, NEGATE)
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
        prefix_k_ptr += batch * stride_pkb + kv_head * stride_pkh
        prefix_v_ptr += batch * stride_pvb + kv_head * stride_pvh
        mask_ptr += batch * stride_mask_b
        row_lse = _load_lse(lse_ptr, rows, exists, q)
    factor = delta * 0.0 + 1.0
    if GATED:
        prefix_row_lse = _load_lse(prefix_lse_ptr, rows, exists, q)
        prefix_delta = delta * 0.0
        correction = delta * 0.0 + 1.0
        if BLOCK_P > 0:
            factor = tanh(tl.load(gate_ptr + head)) + delta * 0.0
            prefix_delta, total = _prefix_delta(
                q, dout, prefix_row_lse, prefix_k_ptr, prefix_v_ptr, stride_pkn, stride_pvn, P,
                seed_ptr, rows, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_M, BLOCK_P, DROPOUT, PRECISION,
            )  # fmt: skip
            if EXACT:
                correction = _correction(total)
                prefix_delta *= correction
        tl.store(prefix_delta_ptr + rows, prefix_delta, mask=exists)
        delta -= factor * prefix_delta
        if EXACT:
            tl.store(prefix_correction_ptr + rows, correction, mask=exists)
            factor *= correction
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + rows, mask=exists, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=exists)

    if NEED_DQ or EXACT:
        first, last = seen_keys(
            query, S, T, window, cu_seqlens_ptr, segments, steps, CAUSAL, WINDOW, PACKED
        )
        start, before, whole, whole_blocks, edges = block_ranges(first, last, BLOCK_N, KEY_MASK)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if BLOCK_P > 0 and not GATED:
            dq, total = _add_query_gradient(
                dq, total, q, dout, row_lse, delta, factor, prefix_k_ptr, prefix_v_ptr,
                stride_pkn, stride_pvn, 0, 0, 0, 0, tl.cdiv(P, BLOCK_P), P, first, last,
                mask_ptr, 0, seed_ptr, rows, 0, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_P, True, False, False, False, False, DROPOUT, PRECISION,
            )  # fmt: skip
        if not KEY_MASK:
            dq, total = _add_query_gradient(
                dq, total, q, dout, row_lse, delta, factor, k_ptr, v_ptr, stride_kn, stride_vn,
                whole, 0, 0, 0, whole_blocks, T, first, last, mask_ptr, stride_mask,
                seed_ptr, rows, padded, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_N, False, False, False, False, False, DROPOUT, PRECISION,
            )  # fmt: skip
        dq, total = _add_query_gradient(
            dq, total, q, dout, row_lse, delta, factor, k_ptr, v_ptr, stride_kn, stride_vn,
            start, before, whole, whole_blocks, edges, T, first, last, mask_ptr, stride_mask,
            seed_ptr, rows, padded, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_N, True, True, BOUNDED, KEY_MASK, False, DROPOUT, PRECISION,
        )  # fmt: skip
        if EXACT:
            correction = _correction(total)
            tl.store(correction_ptr + rows, correction, mask=exists)
            dq *= correction[:, None]
        if BLOCK_P > 0 and GATED:
            dq, total = _add_query_gradient(
                dq, total, q, dout, prefix_row_lse, prefix_delta, factor,
                prefix_k_ptr, prefix_v_ptr, stride_pkn, stride_pvn,
                0, 0, 0, 0, tl.cdiv(P, BLOCK_P), P, first, last,
                mask_ptr, 0, seed_ptr, rows, 0, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_P, True, False, False, False, True, DROPOUT, PRECISION,
            )  # fmt: skip
        if NEED_DQ:
            store_block(dq_ptr, dq * scale, rows * D, exists, D, BLOCK_D)


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, gate_ptr,
    stride_qh, stride_qm, stride_oh, stride_om, tile, first_row, S, group, first, last,
    seed_ptr, column, groups, drop_threshold, score_scale, inverse_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOAD_MASK: tl.constexpr, BOUNDED: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return (dk / scale, dv · (1 - p)) of a tile of keys after one tile of rows.

    BOUNDED: a key is seen by the queries of [first, last). ``gate_ptr`` is at the first head.
    """
    head, query, row, exists = row_tile(tile, S, group, BLOCK_M, FOLD)
    rows = first_row + row
    query64 = query.to(tl.int64)
    q = load_block(q_ptr, head * stride_qh + query64 * stride_qm, exists, D, BLOCK_D, LOAD_MASK)
    dout = load_block(
        dout_ptr, head * stride_oh + query64 * stride_om, exists, D, BLOCK_D, LOAD_MASK
    )
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p = exponential(s * score_scale - _load_lse(lse_ptr, rows, exists, q)[None, :], q)
    if BOUNDED:
        seen = (query[None, :] >= first[:, None]) & (query[None, :] < last[:, None])
        p = tl.where(seen, p, 0.0)
    if q.dtype == tl.float32:
        p *= tl.load(correction_ptr + rows, mask=exists, other=0.0)[None, :]
    if GATED:
        p *= tanh(tl.load(gate_ptr + head + row * 0))[None, :]
    kept = p
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = tl.trans(keep_mask(seed, rows, column // 4, groups, drop_threshold, BLOCK_N))
        kept = tl.where(keep, p, 0.0)
    if NEED_DV:
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
    if NEED_DK:
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        delta = tl.load(delta_ptr + rows, mask=exists, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=["S", "T", "P", "window", "segments", "steps", "drop_threshold"]
)
def _prefix_key_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr, delta_ptr,
    correction_ptr, dk_ptr, dv_ptr, stride_ob, stride_oh, stride_om, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_mask_b, stride_mask,
    S, T, P, kv_heads, group, window, segments, steps, scale, score_scale, inverse_keep, drop_threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, FOLD: tl.constexpr, NEGATE: tl.constexpr, NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (batch · key heads · key tiles,): dk and dv of the sequence."""
    BOUNDED: tl.constexpr = CAUSAL or WINDOW or PACKED or KEY_MASK
    tiles = tl.cdiv(T, BLOCK_N)
    pair = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * BLOCK_N
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    key = n + tl.arange(0, BLOCK_N)
    exists = key < T
    key64 = key.to(tl.int64)
    k = load_block(
        k_ptr + batch * stride_kb + kv_head * stride_kh, key64 * stride_kn, exists, D, BLOCK_D, True
    )
    v = load_block(
        v_ptr + batch * stride_vb + kv_head * stride_vh, key64 * stride_vn, exists, D, BLOCK_D, True
    )
    k = negated(k, NEGATE)
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    dout_ptr += batch * stride_ob + kv_head * group * stride_oh
    first_row = pair.to(tl.int64) * group * S

    # Keys that do not exist are the last one, so that they lengthen no interval.
    first, last = seeing_queries(
        tl.minimum(key, T - 1), S, T, window, cu_seqlens_ptr, segments, steps,
        CAUSAL, WINDOW, PACKED,
    )  # fmt: skip
    if KEY_MASK:
        kept = tl.load(mask_ptr + batch * stride_mask_b + key64 * stride_mask, mask=exists, other=0)
        last = tl.where(kept != 0, last, 0)
    start, before, whole, whole_blocks, edges = block_ranges(first, last, BLOCK_M, False)
    padded = tl.cdiv(P, 4) * 4
    groups = (padded + tl.cdiv(T, 4) * 4) // 4
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if FOLD:
        for tile in range(tl.cdiv(group * S, BLOCK_M)):
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, lse_ptr,
                stride_qh, stride_qm, stride_oh, stride_om, tile, first_row, S, group, first, last,
                seed_ptr, padded + n, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_M, BLOCK_N, True, BOUNDED, False, DROPOUT, FOLD,
                NEED_DK, NEED_DV, PRECISION,
            )  # fmt: skip
    else:
        blocks = tl.cdiv(S, BLOCK_M)
        for index in range(group * whole_blocks):
            tile = index // whole_blocks * blocks + whole + index % whole_blocks
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, lse_ptr,
                stride_qh, stride_qm, stride_oh, stride_om, tile, first_row, S, group, first, last,
                seed_ptr, padded + n, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_M, BLOCK_N, False, False, False, DROPOUT, FOLD,
                NEED_DK, NEED_DV, PRECISION,
            )  # fmt: skip
        for index in range(group * edges):
            block = edge_block(index % edges, start, before, whole, whole_blocks)
            tile = index // edges * blocks + block
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, lse_ptr,
                stride_qh, stride_qm, stride_oh, stride_om, tile, first_row, S, group, first, last,
                seed_ptr, padded + n, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_M, BLOCK_N, True, BOUNDED, False, DROPOUT, FOLD,
                NEED_DK, NEED_DV, PRECISION,
            )  # fmt: skip
    rows = pair.to(tl.int64) * T + key64  # of [B, Hkv, T]
    if NEED_DK:
        store_block(dk_ptr, dk * scale, rows * D, exists, D, BLOCK_D)
    if NEED_DV:
        store_block(dv_ptr, dv * inverse_keep, rows * D, exists, D, BLOCK_D)


@triton.jit
def _sum_parts(part_ptr, splits, size, offs, mask, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the sum of all parts of a tile in index order."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for split in range(splits):
        total += tl.load(
            part_ptr + split * size + offs,
            mask=mask, other=0.0, cache_modifier=".cg",
        )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["B", "S", "T", "P", "drop_threshold"])
def _prefix_gradient_kernel(
    dout_ptr, q_ptr, prefix_k_ptr, prefix_v_ptr, gate_ptr, seed_ptr, lse_ptr, delta_ptr,
    correction_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr, counters_ptr,
    stride_ob, stride_oh, stride_om, stride_qb, stride_qh, stride_qm,
    stride_pkb, stride_pkh, stride_pkn, stride_pvb, stride_pvh, stride_pvn,
    B, S, T, P, kv_heads, group, scale, score_scale, inverse_keep, drop_threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    NEGATE: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (prefix tiles, prefixes · key heads, splits); B: batch rows that share a prefix.

    ``lse`` and ``delta`` are those of the softmax that the prefix takes part in.
    """
    n = tl.program_id(0) * BLOCK_N
    pair = tl.program_id(1)  # of [Bp, Hkv]
    owner, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    offs_n = n + tl.arange(0, BLOCK_N)
    exists = offs_n < P
    offs_n64 = offs_n.to(tl.int64)
    k = load_block(
        prefix_k_ptr + owner * stride_pkb + kv_head * stride_pkh, offs_n64 * stride_pkn,
        exists, D, BLOCK_D, True,
    )  # fmt: skip
    v = load_block(
        prefix_v_ptr + owner * stride_pvb + kv_head * stride_pvh, offs_n64 * stride_pvn,
        exists, D, BLOCK_D, True,
    )  # fmt: skip
    k = negated(k, NEGATE)
    q_ptr += kv_head * group * stride_qh
    dout_ptr += kv_head * group * stride_oh
    groups = tl.cdiv(P, 4) + tl.cdiv(T, 4)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    tiles = row_tiles(S, group, BLOCK_M, FOLD)
    length = tl.cdiv(B * tiles, SPLITS)
    begin = tl.program_id(2) * length
    for index in range(begin, tl.minimum(begin + length, B * tiles)):
        batch = owner * B + index // tiles
        dk, dv = _add_key_gradients(
            dk, dv, k, v, q_ptr + batch * stride_qb, dout_ptr + batch * stride_ob,
            lse_ptr, delta_ptr, correction_ptr, gate_ptr + kv_head * group,
            stride_qh, stride_qm, stride_oh, stride_om, index % tiles,
            (batch * kv_heads + kv_head) * group * S, S, group, offs_n, offs_n,
            seed_ptr, n, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_M, BLOCK_N, True, False, GATED, DROPOUT, FOLD,
            NEED_DK, NEED_DV, PRECISION,
        )  # fmt: skip
    dk *= scale
    dv *= inverse_keep

    offs = (pair.to(tl.int64) * P + offs_n64) * D
    finished = True
    if SPLITS > 1:
        size = tl.num_programs(1).to(tl.int64) * P * D
        offs_d = tl.arange(0, BLOCK_D)
        offs_part = offs[:, None] + offs_d[None, :]
        mask = exists[:, None] & (offs_d < D)[None, :]
        split = tl.program_id(2).to(tl.int64) * size
        if NEED_DK:
            tl.store(dk_part_ptr + split + offs_part, dk, mask=mask)
        if NEED_DV:
            tl.store(dv_part_ptr + split + offs_part, dv, mask=mask)
        counter = counters_ptr + pair * tl.num_programs(0) + tl.program_id(0)
        finished = last_to_arrive(counter, SPLITS)
    if finished:
        if SPLITS > 1:
            if NEED_DK:
                dk = _sum_parts(dk_part_ptr, SPLITS, size, offs_part, mask, BLOCK_N, BLOCK_D)
            if NEED_DV:
                dv = _sum_parts(dv_part_ptr, SPLITS, size, offs_part, mask, BLOCK_N, BLOCK_D)
        if NEED_DK:
            store_block(dk_ptr, dk, offs, exists, D, BLOCK_D)
        if NEED_DV:
            store_block(dv_ptr, dv, offs, exists, D, BLOCK_D)


@triton.jit(do_not_specialize=["B", "S"])
def _gate_gradient_kernel(
    prefix_delta_ptr, gate_ptr, dgate_ptr, B, heads, S, BLOCK: tl.constexpr
):
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
