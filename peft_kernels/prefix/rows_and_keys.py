"""Who sees whom in prefix attention, and how tiles of rows and of keys are addressed.

All masks but ``key_mask`` are one interval of keys for each query (``seen_keys``), or of queries
for each key (``seeing_queries``): causal, window and packed segments cut it shorter. Blocks outside
the intervals of a tile are not visited, blocks inside all of them need no mask (``block_ranges``).

The query heads of one key head are rows: row r of S · group has head r // S and query r % S, which
is how [B, Hq, S] lies in memory. A tile holds rows of one head, or under FOLD of as many as fit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_tile(tile, S, group, BLOCK_M: tl.constexpr, FOLD: tl.constexpr):
    """Return (head in the group, query, row, whether it exists) of a tile's rows.

    Queries and rows that do not exist are the last one, so that they lengthen no interval.
    """
    offs_m = tl.arange(0, BLOCK_M)
    if FOLD:
        row = tile * BLOCK_M + offs_m
        exists = row < group * S
        row = tl.minimum(row, group * S - 1)
        return row // S, row % S, row, exists
    else:
        blocks = tl.cdiv(S, BLOCK_M)
        head = tile // blocks
        query = (tile % blocks) * BLOCK_M + offs_m
        exists = query < S
        query = tl.minimum(query, S - 1)
        return head, query, head * S + query, exists


@triton.jit
def carried(upper, lower, size):
    """Return two digits of a count, the lower one of which may have become ``size``."""
    full = lower == size
    return upper + full.to(tl.int32), tl.where(full, 0, lower)


@triton.jit
def row_tiles(S, group, BLOCK_M: tl.constexpr, FOLD: tl.constexpr):
    """Return how many tiles the rows of one key head make."""
    if FOLD:
        return tl.cdiv(group * S, BLOCK_M)
    else:
        return group * tl.cdiv(S, BLOCK_M)


@triton.jit
def _segment(cu_seqlens_ptr, segments, steps, position):
    """Return first and past-the-last position of the segments that hold ``position``."""
    low = position * 0
    high = low + segments
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + middle) <= position
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return tl.load(cu_seqlens_ptr + low), tl.load(cu_seqlens_ptr + low + 1)


@triton.jit
def seen_keys(
    query, S, T, window, cu_seqlens_ptr, segments, steps,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the interval of keys that each query sees, first and past the last one."""
    position = query + (T - S)
    first = position * 0
    last = first + T
    if CAUSAL:
        last = tl.minimum(last, position + 1)
    elif WINDOW:
        last = tl.minimum(last, position + window)
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
    if PACKED:
        start, stop = _segment(cu_seqlens_ptr, segments, steps, query)
        first, last = tl.maximum(first, start), tl.minimum(last, stop)
    return first, last


@triton.jit
def seeing_queries(
    key, S, T, window, cu_seqlens_ptr, segments, steps,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the interval of queries that see each key, first and past the last one."""
    position = key - (T - S)
    first = position * 0
    last = first + S
    if WINDOW:
        last = tl.minimum(last, position + window)
    if CAUSAL:
        first = tl.maximum(first, position)
    elif WINDOW:
        first = tl.maximum(first, position - window + 1)
    if PACKED:
        start, stop = _segment(cu_seqlens_ptr, segments, steps, key)
        first, last = tl.maximum(first, start), tl.minimum(last, stop)
    return first, last


@triton.jit
def block_ranges(first, last, BLOCK: tl.constexpr, ALL_EDGES: tl.constexpr):
    """Return (first block, its edge blocks, first whole block, whole blocks, edge blocks in all).

    Whole blocks lie inside every interval and need no mask. The blocks with an edge of an interval
    are those before and those behind them.
    """
    start = tl.min(first, axis=0) // BLOCK
    stop = tl.maximum(tl.cdiv(tl.max(last, axis=0), BLOCK), start)
    if ALL_EDGES:
        return start, stop - start, stop, 0, stop - start
    else:
        whole = tl.minimum(tl.maximum(tl.cdiv(tl.max(first, axis=0), BLOCK), start), stop)
        behind = tl.minimum(tl.maximum(tl.min(last, axis=0) // BLOCK, whole), stop)
        return start, whole - start, whole, behind - whole, (whole - start) + (stop - behind)


@triton.jit
def edge_block(index, start, before, whole, whole_blocks):
    """Return the block of an edge by its index: those before the whole ones, then those behind."""
    return tl.where(index < before, start + index, whole + whole_blocks + (index - before))


@triton.jit
def load_block(ptr, offsets, exists, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr):
    """Return [len(offsets), BLOCK_D] of rows of D elements that start at ``offsets``."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets[:, None] + offs_d[None, :]
    if MASK and D < BLOCK_D:
        return tl.load(ptrs, mask=exists[:, None] & (offs_d < D)[None, :], other=0.0)
    elif MASK:
        return tl.load(ptrs, mask=exists[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_rows(
    ptr, stride, batch, head, first, stop, BLOCK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return rows [first, first + BLOCK) of one head, [BLOCK, BLOCK_D].

    TMA: ``ptr`` is a descriptor of [batches, heads, rows, D], which gives zeros where it has none.
    Else it is the head's address, and rows from ``stop`` on are zeros under MASK.
    """
    if TMA:
        return ptr.load([batch, head, first, 0]).reshape([BLOCK, BLOCK_D])
    else:
        offs = tl.arange(0, BLOCK)
        ptr += first.to(tl.int64) * stride
        return load_block(ptr, offs * stride, first + offs < stop, D, BLOCK_D, MASK)


@triton.jit
def load_row_numbers(
    ptr, head, first, first_of_all, exists, BLOCK: tl.constexpr, MASK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Return one number of each of BLOCK rows, 0 of those that do not exist.

    TMA: ``ptr`` is a descriptor of [heads of all batch rows, rows], of which ``head`` and ``first``
    are meant. Else it is an address, ``first_of_all`` counts from there, and MASK says whether any
    row does not exist.
    """
    if TMA:
        return ptr.load([head.to(tl.int32), first]).reshape([BLOCK])
    elif MASK:
        return tl.load(ptr + first_of_all + tl.arange(0, BLOCK), mask=exists, other=0.0)
    else:
        return tl.load(ptr + first_of_all + tl.arange(0, BLOCK))


@triton.jit
def store_block(ptr, value, offsets, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [len(offsets), BLOCK_D] as rows of D elements that start at ``offsets``."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (offs_d < D)[None, :]
    ptrs = ptr + offsets[:, None] + offs_d[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)
