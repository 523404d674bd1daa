"""Prefix attention in plain PyTorch: the specification of every other backend.

Query i of S stands at key position i + T - S. With s = scale · q kᵀ over the prefix keys (p, always
seen) and over the sequence keys (t, -inf where not seen), one softmax over both:

    [w_p, w_t] = softmax([s_p, s_t])     out = w_p v_p + w_t v_t     lse = logsumexp([s_p, s_t])

Gated, with c = tanh(gate) for each query head, two softmaxes, and lse is that of the sequence:

    out = softmax(s_t) v + c softmax(s_p) v_p

Dropout acts on the probabilities, with keep mask m and q = 1 / (1 - p). Backward, for
both key ranges alike, with dw = q m (dout vᵀ) and delta = Σ w dw over both (= Σ_d dout · out):

    ds = w (dw - delta + dlse)     dq = scale · ds k     dk = scale · dsᵀ q     dv = (q m w)ᵀ dout

Gated, each softmax has a delta of its own, δ_p and δ_t, and Σ_d dout · out = δ_t + c δ_p:

    ds_p = c w_p (dw_p - δ_p)     ds_t = w_t (dw_t - δ_t + dlse)     dgate = (1 - c²) Σ δ_p

Sums are made in float32 (float64 for float64); probabilities and ds are rounded to the dtype of the
tensors before their products, as eager and flash attention round them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.core.checks import outside_autocast
from peft_kernels.core.rng import dropout_mask

# Of so few rows, sums are made in parts of so many.
_FEW_ROWS, _PART = 16, 32


class _Weights(NamedTuple):
    """Probabilities of both key ranges, before and after dropout, each [B, Hkv, G·S, P or T].

    Attributes:
        prefix: w_p.
        own: w_t.
        kept_prefix: q m w_p in the dtype of the tensors.
        kept_own: q m w_t, likewise.
        keep_prefix: q m over the prefix, or None without dropout.
        keep_own: q m over the sequence, likewise.
        lse: [B, Hkv, G·S].
        prefix_lse: the same of the prefix, where gated.
    """

    prefix: Tensor
    own: Tensor
    kept_prefix: Tensor
    kept_own: Tensor
    keep_prefix: Tensor | None
    keep_own: Tensor | None
    lse: Tensor
    prefix_lse: Tensor | None


def dropout_columns(prefix: int) -> int:
    """Return the first column of the sequence in the dropout mask: P rounded up to fours."""
    return -(-prefix // 4) * 4


def seen(
    queries: int,
    keys: int,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Return which sequence key each query sees, bool [B or 1, S, T]; None where it sees all."""
    found = None if key_mask is None else key_mask[:, None, :]
    if not causal and window is None and cu_seqlens is None:
        return found
    at = torch.arange(keys - queries, keys, device=device)[:, None]  # [S, 1]
    key = torch.arange(keys, device=device)
    rule = key <= at if causal else torch.ones((), dtype=torch.bool, device=device)
    if window is not None:
        distance = at - key if causal else (at - key).abs()
        rule = rule & (distance < window)
    if cu_seqlens is not None:
        segment = torch.searchsorted(cu_seqlens, key.to(cu_seqlens.dtype), right=True)
        rule = rule & (segment[:, None] == segment)  # S == T
    rule = rule.expand(queries, keys)[None]
    return rule if found is None else rule & found


def _folded(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Return [B, Hq, S, n] as [B, Hkv, G·S, n]: queries that share keys are rows of one product."""
    batch, heads, queries, size = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * queries, size).to(dtype)


def _for_prefix(x: Tensor, shared: bool) -> Tensor:
    """Return [B, Hkv, M, n] as [1, Hkv, B·M, n] where all batch rows share the prefix."""
    if not shared:
        return x
    batch, kv_heads, rows, size = x.shape
    return x.transpose(0, 1).reshape(1, kv_heads, batch * rows, size)


def _from_prefix(x: Tensor, batch: int, rows: int) -> Tensor:
    """Undo ``_for_prefix``."""
    kv_heads, size = x.shape[1], x.shape[3]
    if x.shape[0] == batch:
        return x
    return x.view(kv_heads, batch, rows, size).transpose(0, 1)


def _over_prefix(x: Tensor, prefix: Tensor) -> Tensor:
    """Return x [B, Hkv, M, n] @ prefix [Bp, Hkv, n, m] without a copy of prefix for each row."""
    shared = prefix.shape[0] == 1
    return _from_prefix(_by_row(_for_prefix(x, shared), prefix), x.shape[0], x.shape[2])


def _by_key(weights: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Return weightsᵀ [B, Hkv, n, M] @ rows [B, Hkv, M, m], each query head's product for itself.

    Summed after that over the heads, as eager sums: in shorter sums, which round less.
    """
    return (weights.unflatten(2, (groups, -1)).mT @ rows.unflatten(2, (groups, -1))).sum(2)


def _by_row(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights [..., M, n] @ values [..., n, m].

    Of few rows in parts of n: of those the libraries of GPUs sum all of n in one chain.
    """
    depth = values.shape[-2]
    whole = depth // _PART * _PART
    if weights.shape[-2] > _FEW_ROWS or depth <= _PART:
        return weights @ values
    parts = weights[..., :whole].unflatten(-1, (-1, _PART)).transpose(-2, -3)
    total = (parts @ values[..., :whole, :].unflatten(-2, (-1, _PART))).sum(-3)
    return total + weights[..., whole:] @ values[..., whole:, :]


def _by_prefix_key(weights: Tensor, rows: Tensor, groups: int, shared: bool) -> Tensor:
    """Return ``_by_key`` as [Bp, Hkv, P, m]: added up over the batch, row by row, where shared."""
    if not shared:
        return _by_key(weights, rows, groups)
    total = _by_key(weights[:1], rows[:1], groups)
    for row in range(1, rows.shape[0]):
        total += _by_key(weights[row : row + 1], rows[row : row + 1], groups)
    return total


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and logsumexp over the last dimension; zeros and -inf where all is -inf."""
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1)
    return weights.masked_fill(lse.isneginf()[..., None], 0.0), lse


def _weights(
    q: Tensor,
    key: Tensor,
    prefix_key: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    gated: bool,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    queries: int,
    dtype: torch.dtype,
) -> _Weights:
    batch, kv_heads, rows, _ = q.shape
    keys, prefix = key.shape[2], prefix_key.shape[2]
    scores = _by_row(q, key.to(q.dtype).mT) * scale
    mask = seen(queries, keys, key_mask, cu_seqlens, causal, window, q.device)
    if mask is not None:
        grouped = scores.view(batch, kv_heads, rows // max(1, queries), queries, keys)
        scores = grouped.masked_fill(~mask[:, None, None], -torch.inf).view_as(scores)
    of_prefix = _over_prefix(q, prefix_key.to(q.dtype).mT) * scale
    prefix_lse = None
    if gated:
        (w_p, prefix_lse), (w_t, lse) = _softmax(of_prefix), _softmax(scores)
    else:
        both, lse = _softmax(torch.cat([of_prefix, scores], -1))
        w_p, w_t = both.split([prefix, keys], -1)
    keep_p, keep_t, kept_p, kept_t = None, None, w_p, w_t
    if seed is not None:
        first = dropout_columns(prefix)
        keep = dropout_mask(seed, batch * kv_heads * rows, first + keys, dropout_p)
        keep = keep.view(batch, kv_heads, rows, first + keys) / q.new_tensor(1.0 - dropout_p)
        keep_p, keep_t = keep[..., :prefix], keep[..., first:]
        kept_p, kept_t = w_p * keep_p, w_t * keep_t
    kept_p, kept_t = kept_p.to(dtype).to(q.dtype), kept_t.to(dtype).to(q.dtype)
    return _Weights(w_p, w_t, kept_p, kept_t, keep_p, keep_t, lse, prefix_lse)


def _gate(gate: Tensor, kv_heads: int, queries: int) -> Tensor:
    """Return tanh(gate) for each row, [Hkv, G·S, 1]."""
    return gate.tanh().repeat_interleave(queries).view(kv_heads, -1, 1)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    prefix_lse: Tensor | None,
) -> None:
    """Write out [B, Hq, S, d], lse [B, Hq, S] and, where gated, prefix_lse; see the module.

    Args:
        query: [B, Hq, S, d].
        key: [B, Hkv, T, d].
        value: [B, Hkv, T, d].
        prefix_key: [1 or B, Hkv, P, d].
        prefix_value: [1 or B, Hkv, P, d].
        key_mask: bool [B, T], True = seen, or None.
        cu_seqlens: int32 [n + 1], where packed sequences start and the last one ends, or None.
        gate: [Hq] in the dtype of lse, or None.
        seed: int64 [1], or None for no dropout.
        causal: whether keys after the query are hidden.
        scale: of the scores.
        window: keys at this distance or farther are hidden; None hides none.
        dropout_p: drop probability.
        out: [B, Hq, S, d], contiguous.
        lse: [B, Hq, S], contiguous, float32 (float64 for float64).
        prefix_lse: the same where gated, else None.
    """
    kv_heads, queries, wide = key.shape[1], query.shape[2], lse.dtype
    w = _weights(
        _folded(query, kv_heads, wide), key, prefix_key, key_mask, cu_seqlens, seed,
        gate is not None, causal, scale, window, dropout_p, queries, query.dtype,
    )  # fmt: skip
    of_prefix = _over_prefix(w.kept_prefix, prefix_value.to(wide))
    if gate is not None:
        of_prefix = of_prefix * _gate(gate, kv_heads, queries)
    out.view(of_prefix.shape).copy_(_by_row(w.kept_own, value.to(wide)) + of_prefix)
    lse.view(w.lse.shape).copy_(w.lse)
    if prefix_lse is not None and w.prefix_lse is not None:
        prefix_lse.view(w.lse.shape).copy_(w.prefix_lse)


@outside_autocast
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    prefix_lse: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    dropout_p: float,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dprefix_key: Tensor | None,
    dprefix_value: Tensor | None,
    dgate: Tensor | None,
) -> None:
    """Write the gradients that are not None; see the module and ``forward``.

    ``dprefix_key`` and ``dprefix_value`` [1 or B, Hkv, P, d] are summed over the query heads and,
    where the prefix is shared, over the batch. ``dlse`` [B, Hq, S] is the gradient of lse, or None.
    """
    kv_heads, queries, wide = key.shape[1], query.shape[2], lse.dtype
    groups, shared = query.shape[1] // kv_heads, prefix_key.shape[0] == 1
    q, g = (_folded(each, kv_heads, wide) for each in (query, dout))
    w = _weights(
        q, key, prefix_key, key_mask, cu_seqlens, seed, gate is not None, causal, scale, window,
        dropout_p, queries, query.dtype,
    )  # fmt: skip
    c = None if gate is None else _gate(gate, kv_heads, queries)
    if dvalue is not None:
        dvalue.copy_(_by_key(w.kept_own, g, groups))
    if dprefix_value is not None:
        scaled = g if c is None else g * c
        dprefix_value.copy_(_by_prefix_key(w.kept_prefix, scaled, groups, shared))
    if dquery is None and dkey is None and dprefix_key is None and dgate is None:
        return
    dw_p = _over_prefix(g, prefix_value.to(wide).mT)
    dw_t = _by_row(g, value.to(wide).mT)
    if w.keep_prefix is not None and w.keep_own is not None:
        dw_p, dw_t = dw_p * w.keep_prefix, dw_t * w.keep_own
    delta_p = (w.prefix * dw_p).sum(-1, keepdim=True)  # [B, Hkv, G·S, 1]
    delta = (w.own * dw_t).sum(-1, keepdim=True)
    if c is None:
        delta = delta_p = delta + delta_p
    else:
        if dgate is not None and gate is not None:
            by_head = delta_p.reshape(*dout.shape[:2], queries).sum((0, 2))
            dgate.copy_(by_head * (1.0 - gate.tanh().square()))
    dw_p, dw_t = dw_p - delta_p, dw_t - delta
    if dlse is not None:
        dlse = dlse.reshape(delta.shape)
        dw_t = dw_t + dlse
        dw_p = dw_p + dlse if c is None else dw_p
    ds_p, ds_t = w.prefix * dw_p, w.own * dw_t
    if c is not None:
        ds_p = ds_p * c
    ds_p, ds_t = ds_p.to(query.dtype).to(wide), ds_t.to(query.dtype).to(wide)
    if dquery is not None:
        from_prefix = _over_prefix(ds_p, prefix_key.to(wide))
        dquery.view(q.shape).copy_((_by_row(ds_t, key.to(wide)) + from_prefix) * scale)
    if dkey is not None:
        dkey.copy_(_by_key(ds_t, q, groups) * scale)
    if dprefix_key is not None:
        dprefix_key.copy_(_by_prefix_key(ds_p, q, groups, shared) * scale)
