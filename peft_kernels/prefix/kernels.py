"""Prefix attention in Triton: forward in one launch.

    s = scale · q kᵀ     out = softmax([s over prefix ; s over seen keys]) [V_prefix ; V]

gated:

    out = softmax(s over seen keys) V + tanh(gate) · softmax(s over prefix) V_prefix

Grid (batch · key heads · row tiles,). A program holds a tile of query rows and their output in
registers and streams keys: first the prefix, whose only mask is its end and which every batch row
reads in place, then the blocks of the sequence that some row of the tile sees, those that lie
inside every row's interval without a mask. The exponential is one of two, whose scores
``score_scale`` makes (|scale| log2 e), but in float32, where a change of base would cost accuracy.

Read: q once, prefix, k and v once per row tile from L2, by key head: query heads share them by
index. Written: out and lse once. Probabilities are rounded to the dtype before they meet V, as
flash attention does; dropout acts on them and is drawn again from its seed in backward.

Gated, the prefix comes last and twice: once for its normaliser, once for its values, so that one
accumulator is enough, and the sequence is bit for bit what it is without a prefix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import keep_mask, multiply_add
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
    log_sum,
    negated,
    power_of_two,
    scores,
    tanh,
)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kn, stride_vn, batch, kv_head,
    start, before, whole, whole_blocks, blocks, stop, first, last, mask_ptr, stride_mask,
    seed_ptr, rows, column, groups, drop_threshold, score_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, EDGES: tl.constexpr, BOUNDED: tl.constexpr, KEY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return (acc, row_max, row_sum) after some blocks of keys, from ``start`` on or EDGES."""
    offs = tl.arange(0, BLOCK_N)
    for index in range(blocks):
        block = start + index
        if EDGES:
            block = edge_block(index, start, before, whole, whole_blocks)
        n = block * BLOCK_N
        k = load_rows(k_ptr, stride_kn, batch, kv_head, n, stop, BLOCK_N, D, BLOCK_D, MASK, TMA)
        s = scores(
            q, k, n + offs, stop, first, last, mask_ptr, stride_mask,
            MASK, BOUNDED, KEY_MASK, PRECISION,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * score_scale)
        p = exponential(s * score_scale - new_max[:, None], q)
        shrink = exponential(row_max - new_max, q)
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, rows, (column + n) // 4, groups, drop_threshold, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = load_rows(v_ptr, stride_vn, batch, kv_head, n, stop, BLOCK_N, D, BLOCK_D, MASK, TMA)
        acc = multiply_add(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _normaliser(
    q, k_ptr, stride_kn, batch, kv_head, blocks, stop, score_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return (row_max, row_sum) of the scores over the prefix."""
    offs = tl.arange(0, BLOCK_N)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for index in range(blocks):
        n = index * BLOCK_N
        k = load_rows(k_ptr, stride_kn, batch, kv_head, n, stop, BLOCK_N, D, BLOCK_D, MASK, TMA)
        s = scores(q, k, n + offs, stop, 0, 0, 0, 0, MASK, False, False, PRECISION)
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * score_scale)
        p = exponential(s * score_scale - new_max[:, None], q)
        row_sum = row_sum * exponential(row_max - new_max, q) + tl.sum(p, axis=1)
        row_max = new_max
    return row_max, row_sum


@triton.jit
def _add_gated(
    acc, factor, row_max, q, k_ptr, v_ptr, stride_kn, stride_vn, batch, kv_head, blocks, stop,
    seed_ptr, rows, groups, drop_threshold, score_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return acc + factor · e^(s - row_max) V_prefix, the factor one number for each row.

    A power of two of each factor goes into acc and out again: see ``power_of_two``.
    """
    offs = tl.arange(0, BLOCK_N)
    unit = power_of_two(factor)
    acc = acc * (1.0 / unit)[:, None]
    factor = factor * (1.0 / unit)
    for index in range(blocks):
        n = index * BLOCK_N
        k = load_rows(k_ptr, stride_kn, batch, kv_head, n, stop, BLOCK_N, D, BLOCK_D, MASK, TMA)
        s = scores(q, k, n + offs, stop, 0, 0, 0, 0, MASK, False, False, PRECISION)
        p = exponential(s * score_scale - row_max[:, None], q) * factor[:, None]
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, rows, n // 4, groups, drop_threshold, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = load_rows(v_ptr, stride_vn, batch, kv_head, n, stop, BLOCK_N, D, BLOCK_D, MASK, TMA)
        acc = multiply_add(p.to(v.dtype), v, acc, PRECISION)
    return acc * unit[:, None]


@triton.jit(do_not_specialize=["S", "T", "P", "window", "segments", "steps", "drop_threshold"])
def _prefix_forward_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, mask_ptr, cu_seqlens_ptr, gate_ptr, seed_ptr,
    out_ptr, lse_ptr, prefix_lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_pkb, stride_pkh, stride_pkn, stride_pvb, stride_pvh, stride_pvn,
    stride_mask_b, stride_mask,
    S, T, P, kv_heads, group, window, segments, steps, score_scale, inverse_keep, drop_threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, RAGGED_P: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, KEY_MASK: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Grid (batch · key heads · row tiles,); BLOCK_P 0: there is no prefix.

    RAGGED_P: the last block of the prefix is not full. TMA: keys, values and the prefix are
    descriptors; a prefix that is shared has a stride of 0.
    """
    BOUNDED: tl.constexpr = CAUSAL or WINDOW or PACKED
    tiles = row_tiles(S, group, BLOCK_M, FOLD)
    pair = tl.program_id(0) // tiles
    # Under a causal mask the last rows see the most: they start first.
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    head, query, row, exists = row_tile(tile, S, group, BLOCK_M, FOLD)
    head = kv_head * group + head
    rows = pair.to(tl.int64) * group * S + row  # of [B, Hq, S]

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
    first, last = seen_keys(
        query, S, T, window, cu_seqlens_ptr, segments, steps, CAUSAL, WINDOW, PACKED
    )
    start, before, whole, whole_blocks, edges = block_ranges(first, last, BLOCK_N, KEY_MASK)
    padded = tl.cdiv(P, 4) * 4
    groups = (padded + tl.cdiv(T, 4) * 4) // 4

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if BLOCK_P > 0 and not GATED:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, prefix_k_ptr, prefix_v_ptr, stride_pkn, stride_pvn,
            owner, kv_index, 0, 0, 0, 0, tl.cdiv(P, BLOCK_P), P, first, last, mask_ptr, 0,
            seed_ptr, rows, 0, groups, drop_threshold, score_scale,
            D, BLOCK_D, BLOCK_P, RAGGED_P, False, False, False, DROPOUT, PRECISION, TMA,
        )  # fmt: skip
    if not KEY_MASK:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kn, stride_vn, sample, kv_index,
            whole, 0, 0, 0, whole_blocks, T, first, last, mask_ptr, stride_mask,
            seed_ptr, rows, padded, groups, drop_threshold, score_scale,
            D, BLOCK_D, BLOCK_N, False, False, False, False, DROPOUT, PRECISION, TMA,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, stride_kn, stride_vn, sample, kv_index,
        start, before, whole, whole_blocks, edges, T, first, last, mask_ptr, stride_mask,
        seed_ptr, rows, padded, groups, drop_threshold, score_scale,
        D, BLOCK_D, BLOCK_N, True, True, BOUNDED, KEY_MASK, DROPOUT, PRECISION, TMA,
    )  # fmt: skip

    tl.store(lse_ptr + rows, log_sum(row_max, row_sum, q), mask=exists)
    acc = acc * (inverse_keep / tl.where(row_sum > 0.0, row_sum, 1.0))[:, None]
    if GATED:
        prefix_max, prefix_sum = row_max, row_sum * 0.0
        if BLOCK_P > 0:
            strength = tanh(tl.load(gate_ptr + head))
            prefix_max, prefix_sum = _normaliser(
                q, prefix_k_ptr, stride_pkn, owner, kv_index, tl.cdiv(P, BLOCK_P), P, score_scale,
                D, BLOCK_D, BLOCK_M, BLOCK_P, RAGGED_P, PRECISION, TMA,
            )  # fmt: skip
            # Zeros would add nothing but the sign of a zero.
            open_gate = tl.max((tl.abs(strength) + prefix_sum * 0.0 > 0.0).to(tl.int32), axis=0)
            acc = _add_gated(
                acc, strength * inverse_keep / prefix_sum, prefix_max,
                q, prefix_k_ptr, prefix_v_ptr, stride_pkn, stride_pvn, owner, kv_index,
                open_gate * tl.cdiv(P, BLOCK_P), P, seed_ptr, rows, groups, drop_threshold,
                score_scale,
                D, BLOCK_D, BLOCK_P, RAGGED_P, DROPOUT, PRECISION, TMA,
            )  # fmt: skip
        tl.store(prefix_lse_ptr + rows, log_sum(prefix_max, prefix_sum, q), mask=exists)
    store_block(out_ptr, acc, rows * D, exists, D, BLOCK_D)
