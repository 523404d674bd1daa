"""Backward of prefix attention in Triton: dk and dv in one launch, the prefix's in one.

    p = e^(s - lse)     dp = keep · dout vᵀ / (1 - p_drop)     ds = p · (dp - delta + dlse)
    dk = scale · Σ_rows dsᵀ q     dv = Σ_rows (keep · p)ᵀ dout / (1 - p_drop)

Launch 2 (batch · key heads · key tiles,) holds a tile of k, v and their gradients in registers and
streams the rows that see it. Launch 3 (prefix tiles, prefixes · key heads, splits) does the same
with the prefix and all rows of all batch rows that share it, split into parts whose float32 sums
the last part to arrive adds in index order: no atomics on numbers, nothing of the size of a prefix
for each batch row. delta and, of exact float32 products, the correction of p come from launch 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import (
    grouped_tile,
    keep_mask,
    last_to_arrive,
    multiply,
    multiply_add,
)
from peft_kernels.prefix.rows_and_keys import (
    block_ranges,
    carried,
    edge_block,
    load_block,
    load_row_numbers,
    load_rows,
    row_tile,
    seeing_queries,
    store_block,
)
from peft_kernels.prefix.score_kernels import (
    exponential,
    lse_of_scores,
    negated,
    power_of_two,
    tanh,
)

_PAIRS_AT_A_TIME = tl.constexpr(64)


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, dlse_ptr, gate_ptr,
    inverse_unit, stride_qh, stride_qm, stride_oh, stride_om, batch, first_head, heads_before,
    head, block, S, group, first, last,
    seed_ptr, column, groups, drop_threshold, score_scale, inverse_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOAD_MASK: tl.constexpr, BOUNDED: tl.constexpr, GATED: tl.constexpr, HAS_DLSE: tl.constexpr,
    DROPOUT: tl.constexpr, FOLD: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, LSE_TMA: tl.constexpr, DV_LATE: tl.constexpr,
):  # fmt: skip
    """Return (dk / scale, dv · (1 - p)) of a tile of keys after one block of a head's rows.

    BOUNDED: a key is seen by the queries of [first, last), so that a query that sees none, whose
    lse is -inf, is in no interval. GATED: p times tanh(gate), whose first head is at ``gate_ptr``,
    times ``inverse_unit``. TMA: q and dout are descriptors, LSE_TMA: lse and delta. LOAD_MASK: some
    rows may not exist; they are zeros and add nothing. DV_LATE: dv's product comes after dp's, so
    that Hopper computes p while that of dp runs and ds while that of dv does; p is held for longer.
    """
    row0 = block * BLOCK_M
    query_head = heads_before + head  # of [B · Hq]
    first_row = query_head * S + row0  # of [B · Hq · S]
    if FOLD:
        head, query, _, exists = row_tile(block, S, group, BLOCK_M, FOLD)
    else:
        query = row0 + tl.arange(0, BLOCK_M)
        exists = query < S
    if TMA:
        q = load_rows(q_ptr, 0, batch, first_head + head, row0, S, BLOCK_M, D, BLOCK_D, False, TMA)
        dout = load_rows(
            dout_ptr, 0, batch, first_head + head, row0, S, BLOCK_M, D, BLOCK_D, False, TMA
        )
    else:
        query64 = query.to(tl.int64)
        offs_q, offs_o = query64 * stride_qm, query64 * stride_om
        q = load_block(q_ptr, head * stride_qh + offs_q, exists, D, BLOCK_D, LOAD_MASK)
        dout = load_block(dout_ptr, head * stride_oh + offs_o, exists, D, BLOCK_D, LOAD_MASK)
    s = multiply(k, tl.trans(q), PRECISION)  # [BLOCK_N, BLOCK_M]
    lse = load_row_numbers(
        lse_ptr, query_head, row0, first_row, exists, BLOCK_M, LOAD_MASK, LSE_TMA
    )
    p = exponential(s * score_scale - lse_of_scores(lse, q)[None, :], q)
    if BOUNDED:
        seen = (query[None, :] >= first[:, None]) & (query[None, :] < last[:, None])
        p = tl.where(seen, p, 0.0)
    EXACT: tl.constexpr = q.dtype == tl.float32 and PRECISION == "ieee"
    if EXACT:
        correction = load_row_numbers(
            correction_ptr, query_head, row0, first_row, exists, BLOCK_M, LOAD_MASK, False
        )
        p *= correction[None, :]
    if GATED:
        p *= (tanh(tl.load(gate_ptr + head + query * 0)) * inverse_unit)[None, :]
    kept = p
    if DROPOUT:
        seed = tl.load(seed_ptr)
        rows = first_row + tl.arange(0, BLOCK_M)
        keep = tl.trans(keep_mask(seed, rows, column // 4, groups, drop_threshold, BLOCK_N))
        kept = tl.where(keep, p, 0.0)
    if NEED_DV and not DV_LATE:
        dv = multiply_add(kept.to(dout.dtype), dout, dv, PRECISION)
    if NEED_DK:
        dp = multiply(v, tl.trans(dout), PRECISION)
        if DROPOUT:
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        delta = load_row_numbers(
            delta_ptr, query_head, row0, first_row, exists, BLOCK_M, LOAD_MASK, LSE_TMA
        )
        ds = dp - delta[None, :]
        if HAS_DLSE and EXACT:
            dlse = load_row_numbers(
                dlse_ptr, query_head, row0, first_row, exists, BLOCK_M, LOAD_MASK, False
            )
            ds += dlse[None, :]
        ds *= p
    if NEED_DV and DV_LATE:
        dv = multiply_add(kept.to(dout.dtype), dout, dv, PRECISION)
    if NEED_DK:
        dk = multiply_add(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["S", "T", "P", "window", "segments", "steps", "drop_threshold"])
def _prefix_key_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr, delta_ptr,
    correction_ptr, dlse_ptr, dk_ptr, dv_ptr, stride_ob, stride_oh, stride_om, stride_qb,
    stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_mask_b, stride_mask,
    S, T, P, kv_heads, group, window, segments, steps, scale, score_scale, inverse_keep,
    drop_threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, FOLD: tl.constexpr, NEGATE: tl.constexpr, HAS_DLSE: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    LSE_TMA: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Grid (batch · key heads · key tiles,): dk and dv of the sequence.

    TMA: q and dout are descriptors, and no tile holds rows of several heads. LSE_TMA: so are lse
    and delta, of [B · Hq, S]. RAGGED: there are tiles of rows some of which do not exist.
    """
    BOUNDED: tl.constexpr = CAUSAL or WINDOW or PACKED or KEY_MASK
    # Heads of 64 leave registers for a third program if p is not held; others for nothing more.
    DV_LATE: tl.constexpr = TMA and D == 128 and not (WINDOW or PACKED or KEY_MASK)
    tiles = tl.cdiv(T, BLOCK_N)
    # Under a causal mask the first keys are seen by the most rows: of some pairs of batch row and
    # head, as many as the cache has room for, they start first.
    pairs = tl.num_programs(0) // tiles
    pair, tile_n = grouped_tile(tl.program_id(0), pairs, tiles, _PAIRS_AT_A_TIME)
    n = tile_n * BLOCK_N
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
    first_head = (kv_head * group).to(tl.int32)
    if not TMA:
        q_ptr += batch * stride_qb + first_head * stride_qh
        dout_ptr += batch * stride_ob + first_head * stride_oh
    heads_before = pair.to(tl.int64) * group

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
        for block in range(tl.cdiv(group * S, BLOCK_M)):
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, dlse_ptr,
                lse_ptr, 1.0, stride_qh, stride_qm, stride_oh, stride_om, batch.to(tl.int32),
                first_head, heads_before, 0, block, S, group, first, last,
                seed_ptr, padded + n, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_M, BLOCK_N, RAGGED, BOUNDED, False, HAS_DLSE,
                DROPOUT, FOLD, NEED_DK, NEED_DV, PRECISION, TMA, LSE_TMA, DV_LATE,
            )  # fmt: skip
    else:
        head, index = 0, 0
        for _ in range(group * whole_blocks):
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, dlse_ptr,
                lse_ptr, 1.0, stride_qh, stride_qm, stride_oh, stride_om, batch.to(tl.int32),
                first_head, heads_before, head, whole + index, S, group, first, last,
                seed_ptr, padded + n, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_M, BLOCK_N, False, False, False, HAS_DLSE,
                DROPOUT, FOLD, NEED_DK, NEED_DV, PRECISION, TMA, LSE_TMA, DV_LATE,
            )  # fmt: skip
            head, index = carried(head, index + 1, whole_blocks)
        head, index = 0, 0
        for _ in range(group * edges):
            block = edge_block(index, start, before, whole, whole_blocks)
            dk, dv = _add_key_gradients(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, correction_ptr, dlse_ptr,
                lse_ptr, 1.0, stride_qh, stride_qm, stride_oh, stride_om, batch.to(tl.int32),
                first_head, heads_before, head, block, S, group, first, last,
                seed_ptr, padded + n, groups, drop_threshold, score_scale, inverse_keep,
                D, BLOCK_D, BLOCK_M, BLOCK_N, RAGGED, BOUNDED, False, HAS_DLSE,
                DROPOUT, FOLD, NEED_DK, NEED_DV, PRECISION, TMA, LSE_TMA, DV_LATE,
            )  # fmt: skip
            head, index = carried(head, index + 1, edges)
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
    correction_ptr, dlse_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr, counters_ptr,
    stride_ob, stride_oh, stride_om, stride_qb, stride_qh, stride_qm,
    stride_pkb, stride_pkh, stride_pkn, stride_pvb, stride_pvh, stride_pvn,
    B, S, T, P, kv_heads, group, scale, score_scale, inverse_keep, drop_threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, FOLD: tl.constexpr,
    NEGATE: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, LSE_TMA: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Grid (prefix tiles, prefixes · key heads, splits); B: batch rows that share a prefix.

    ``lse`` and ``delta`` are those of the softmax that the prefix takes part in. TMA, LSE_TMA and
    RAGGED: as in launch 2.
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
    first_head = (kv_head * group).to(tl.int32)
    groups = tl.cdiv(P, 4) + tl.cdiv(T, 4)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    gate_ptr += kv_head * group
    unit = 1.0
    if GATED:
        strongest = 0.0
        for head in range(group):
            strongest = tl.maximum(strongest, tl.abs(tanh(tl.load(gate_ptr + head))))
        unit = power_of_two(strongest)
    # Blocks of a head's rows, under FOLD of all heads' rows, by head, by batch row: of SPLITS parts
    # that differ by one block at most.
    heads = group
    blocks = tl.cdiv(S, BLOCK_M)
    if FOLD:
        heads = 1
        blocks = tl.cdiv(group * S, BLOCK_M)
    part, longer = B * heads * blocks // SPLITS, B * heads * blocks % SPLITS
    split = tl.program_id(2)
    first = split * part + tl.minimum(split, longer)
    count = part + (split < longer).to(tl.int32)
    sample, head, block = first // (heads * blocks), first // blocks % heads, first % blocks
    # Of a loop that may not run, the assembler makes every product wait for the one before.
    tl.assume(count > 0)
    for _ in range(count):
        batch = owner * B + sample
        if TMA:
            q_rows, dout_rows = q_ptr, dout_ptr
        else:
            q_rows = q_ptr + batch * stride_qb + first_head * stride_qh
            dout_rows = dout_ptr + batch * stride_ob + first_head * stride_oh
        dk, dv = _add_key_gradients(
            dk, dv, k, v, q_rows, dout_rows, lse_ptr, delta_ptr, correction_ptr,
            dlse_ptr, gate_ptr, 1.0 / unit,
            stride_qh, stride_qm, stride_oh, stride_om, batch.to(tl.int32), first_head,
            (batch * kv_heads + kv_head) * group, head, block, S, group, offs_n, offs_n,
            seed_ptr, n, groups, drop_threshold, score_scale, inverse_keep,
            D, BLOCK_D, BLOCK_M, BLOCK_N, RAGGED, False, GATED, HAS_DLSE,
            DROPOUT, FOLD, NEED_DK, NEED_DV, PRECISION, TMA, LSE_TMA, TMA and not GATED,
        )  # fmt: skip
        head, block = carried(head, block + 1, blocks)
        sample, head = carried(sample, head, heads)
    dk *= scale * unit
    dv *= inverse_keep * unit

    offs = (pair.to(tl.int64) * P + offs_n64) * D
    finished = True
    if SPLITS > 1:
        size = tl.num_programs(1).to(tl.int64) * P * D
        offs_d = tl.arange(0, BLOCK_D)
        offs_part = offs[:, None] + offs_d[None, :]
        mask = exists[:, None] & (offs_d < D)[None, :]
        own = split.to(tl.int64) * size
        if NEED_DK:
            tl.store(dk_part_ptr + own + offs_part, dk, mask=mask)
        if NEED_DV:
            tl.store(dv_part_ptr + own + offs_part, dv, mask=mask)
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
