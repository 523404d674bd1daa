"""Prompt tuning in Triton: forward in one launch, backward in one, and one for a trained table.

    token s   goes to column  s + P · [s >= c]        prompt row p  goes to column  c + p

Forward, B + B · ⌈T / BLOCK_T⌉ · ⌈D / BLOCK_D⌉ programs, T = P + S. The first B write one row of
mask, labels, positions and its c each; the others copy one tile of rows from the table or the
prompt. Whoever needs c finds it in the mask (from L2, as far as the padding reaches), so that no
program waits for another. Read once: the rows of the table, the prompt once a batch row; written
once: every output.

Backward. The prompt's gradient: a program sums one tile over the batch. The table's: the ids are
sorted (stably), and the program at the head of a run of equal ids sums the run. Both add in float32
in blocks of CHAIN rows, each from zero, then the blocks, always in ascending order: no atomics, the
bits of ``reference``.

An id outside the vocabulary is not read: its row of embeddings is NaN, its gradient is dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _start_column(mask_ptr, row, S, column, significant, SCAN: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return c of a row: ``column``, or with SCAN the first column whose mask is not zero."""
    start = column
    if SCAN:
        start = S
        first = 0
        while (start == S) & (first < S):
            offs_s = first + tl.arange(0, BLOCK_S)
            mask = tl.load(mask_ptr + row * S + offs_s, mask=offs_s < S, other=0)
            kept = (mask.to(tl.int64) & significant) != 0
            start = tl.min(tl.where(kept, offs_s, S), axis=0)
            first += BLOCK_S
    return start


@triton.jit
def _write_row(
    mask_ptr, labels_ptr, mask_out_ptr, labels_out_ptr, positions_ptr, columns_ptr,
    row, S, P, start, one, significant,
    HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr, SCAN: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write one row of mask, labels and positions, and its c."""
    if SCAN:
        tl.store(columns_ptr + row, start.to(tl.int64))
    T = S + P
    kept_before = tl.zeros((), tl.int64)
    for first in range(0, T, BLOCK_S):
        offs_t = first + tl.arange(0, BLOCK_S)
        mask_t = offs_t < T
        in_prompt = (offs_t >= start) & (offs_t < start + P)
        # Column of the input, read where the prompt is not.
        offs_s = row * S + tl.where(offs_t < start, offs_t, offs_t - P)
        from_input = mask_t & (in_prompt == 0)
        out = row * T + offs_t
        if HAS_LABELS:
            labels = tl.load(labels_ptr + offs_s, mask=from_input, other=-100)
            tl.store(labels_out_ptr + out, labels, mask=mask_t)
        if HAS_MASK:
            mask = tl.load(mask_ptr + offs_s, mask=from_input, other=0)
            mask = tl.where(in_prompt, one.to(mask.dtype), mask)
            tl.store(mask_out_ptr + out, mask, mask=mask_t)
            kept = (mask_t & ((mask.to(tl.int64) & significant) != 0)).to(tl.int64)
            positions = kept_before + tl.cumsum(kept, axis=0) - 1
            tl.store(positions_ptr + out, tl.maximum(positions, 0), mask=mask_t)
            kept_before += tl.sum(kept, axis=0)
        else:
            tl.store(positions_ptr + out, offs_t.to(tl.int64), mask=mask_t)


@triton.jit(do_not_specialize=["one", "significant", "column"])
def _prompt_forward_kernel(
    ids_ptr, weight_ptr, prompt_ptr, mask_ptr, labels_ptr,
    embeddings_ptr, mask_out_ptr, labels_out_ptr, positions_ptr, columns_ptr,
    B, S, P, D, V, stride_w, stride_pb, stride_pp, column, one, significant,
    HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr, SCAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (B rows of bookkeeping, then the tiles of embeddings)."""
    pid = tl.program_id(0)
    if pid < B:
        row = pid.to(tl.int64)
        start = _start_column(mask_ptr, row, S, column, significant, SCAN, BLOCK_S)
        _write_row(
            mask_ptr, labels_ptr, mask_out_ptr, labels_out_ptr, positions_ptr, columns_ptr,
            row, S, P, start, one, significant, HAS_MASK, HAS_LABELS, SCAN, BLOCK_S,
        )  # fmt: skip
    else:
        T = S + P
        tile = pid - B
        num_d, num_t = tl.cdiv(D, BLOCK_D), tl.cdiv(T, BLOCK_T)
        pid_d, pid_t = tile % num_d, (tile // num_d) % num_t
        row = (tile // (num_d * num_t)).to(tl.int64)
        start = _start_column(mask_ptr, row, S, column, significant, SCAN, BLOCK_S)

        offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_t, mask_d = offs_t < T, offs_d < D
        in_prompt = (offs_t >= start) & (offs_t < start + P)
        from_table = mask_t & (in_prompt == 0)
        offs_s = row * S + tl.where(offs_t < start, offs_t, offs_t - P)
        ids = tl.load(ids_ptr + offs_s, mask=from_table, other=0).to(tl.int64)
        in_table = from_table & (ids >= 0) & (ids < V)
        embeddings = tl.load(
            weight_ptr + ids[:, None] * stride_w + offs_d[None, :],
            mask=in_table[:, None] & mask_d[None, :],
            other=float("nan"),
        )  # [BLOCK_T, BLOCK_D]
        offs_p = (offs_t - start).to(tl.int64)
        prompt = tl.load(
            prompt_ptr + row * stride_pb + offs_p[:, None] * stride_pp + offs_d[None, :],
            mask=(mask_t & in_prompt)[:, None] & mask_d[None, :],
            other=0.0,
        )
        embeddings = tl.where(in_prompt[:, None], prompt.to(embeddings.dtype), embeddings)
        out = (row * T + offs_t)[:, None] * D + offs_d[None, :]
        tl.store(embeddings_ptr + out, embeddings, mask=mask_t[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["column"])
def _prompt_gradient_kernel(
    dy_ptr, columns_ptr, d_prompt_ptr, B, P, D, stride_yb, stride_yt, column,
    HAS_COLUMNS: tl.constexpr, PER_SAMPLE: tl.constexpr, CHAIN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (D blocks, P blocks, B for per-sample prompts): d_prompt[p] = Σ_b dy[b, c_b + p]."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (offs_p < P)[:, None] & (offs_d < D)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    first_row = tl.program_id(2)
    last_row = first_row + 1 if PER_SAMPLE else B
    for first in range(first_row, last_row, CHAIN):
        part = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        for i in tl.static_range(1 if PER_SAMPLE else CHAIN):
            row = tl.zeros((), tl.int64) + first + i
            start = column
            if HAS_COLUMNS:
                start = tl.load(columns_ptr + row, mask=row < last_row, other=0)
            offs_t = (start + offs_p).to(tl.int64)
            dy = tl.load(
                dy_ptr + row * stride_yb + offs_t[:, None] * stride_yt + offs_d[None, :],
                mask=mask & (row < last_row),
                other=0.0,
            )
            part += dy.to(tl.float32)
        total += part
    out = (tl.program_id(2).to(tl.int64) * P + offs_p)[:, None] * D + offs_d[None, :]
    tl.store(d_prompt_ptr + out, total.to(d_prompt_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["column", "padding_idx"])
def _table_gradient_kernel(
    dy_ptr, ids_ptr, order_ptr, columns_ptr, d_weight_ptr,
    N, S, P, D, V, stride_yb, stride_yt, column, padding_idx,
    HAS_COLUMNS: tl.constexpr, CHAIN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (N sorted ids, D blocks): the head of a run of equal ids writes their row's gradient."""
    head = tl.program_id(0)
    token = tl.load(ids_ptr + head).to(tl.int64)
    before = tl.load(ids_ptr + head - 1, mask=head > 0, other=-1).to(tl.int64)
    wanted = (token != padding_idx) & (token >= 0) & (token < V)
    if wanted & ((head == 0) | (before != token)):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        total = tl.zeros((BLOCK_D,), tl.float32)
        first = head
        more = True
        while more:
            part = tl.zeros((BLOCK_D,), tl.float32)
            for i in tl.static_range(CHAIN):
                nth = first + i
                same = tl.load(ids_ptr + nth, mask=nth < N, other=-1).to(tl.int64) == token
                place = tl.load(order_ptr + nth, mask=same, other=0)
                row, offs_s = place // S, place % S
                start = column
                if HAS_COLUMNS:
                    start = tl.load(columns_ptr + row, mask=same, other=0)
                offs_t = tl.where(offs_s < start, offs_s, offs_s + P)
                dy = tl.load(
                    dy_ptr + row * stride_yb + offs_t * stride_yt + offs_d,
                    mask=mask_d & same,
                    other=0.0,
                )
                part += dy.to(tl.float32)
            total += part
            first += CHAIN
            more = tl.load(ids_ptr + first, mask=first < N, other=-1).to(tl.int64) == token
        out = token * D + offs_d
        tl.store(d_weight_ptr + out, total.to(d_weight_ptr.dtype.element_ty), mask=mask_d)
