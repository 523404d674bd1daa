"""The variant ``split``: the prefix by our kernel, the sequence by SDPA's flash kernel.

With lse over all keys, the softmax of the whole is the two parts' weighed by exp(lse_part - lse),
and backward needs no merge at all: given the whole's out and lse, each part's own backward makes
its share of dq and its keys' gradients. What is saved is what the fused kernel saves: a forward of
one variant goes with a backward of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def forward(
    launcher: Callable[..., None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write out and lse; ``launcher`` makes the prefix's part of them.

    Args:
        launcher: forward of a backend, see ``reference.forward``.
        query: [B, Hq, S, d].
        key: [B, Hkv, T, d], T >= 1; with causal T = S.
        value: [B, Hkv, T, d].
        prefix_key: [1 or B, Hkv, P, d], P >= 1.
        prefix_value: likewise.
        causal: whether keys after the query are hidden.
        scale: of the scores.
        out: [B, Hq, S, d].
        lse: [B, Hq, S], float32.
    """
    prefix_lse = torch.empty_like(lse)
    launcher(
        query, key[:, :, :0], value[:, :, :0], prefix_key, prefix_value, None, None, None, None,
        False, scale, None, 0.0, out, prefix_lse, None,
    )  # fmt: skip
    own, own_lse = _flash(query, key, value, causal, scale)
    torch.logaddexp(prefix_lse, own_lse, out=lse)
    prefix_share = (prefix_lse - lse).exp_().unsqueeze(-1)
    own_share = (own_lse - lse).exp_().unsqueeze(-1)
    out.copy_(torch.addcmul(out * prefix_share, own, own_share))


def backward(
    launcher: Callable[..., None],
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dprefix_key: Tensor | None,
    dprefix_value: Tensor | None,
) -> None:
    """Write the gradients that are not None; ``launcher`` makes the prefix's share."""
    if any(each is not None for each in (dquery, dprefix_key, dprefix_value)):
        launcher(
            dout, None, query, key[:, :, :0], value[:, :, :0], prefix_key, prefix_value, None, None,
            None, None, out, lse, None, False, scale, None, 0.0, dquery, None, None, dprefix_key,
            dprefix_value, None, partial=True,
        )  # fmt: skip
    if all(each is None for each in (dquery, dkey, dvalue)):
        return
    own = _flash_backward(dout, query, key, value, out, lse, causal, scale)
    if dquery is not None:
        dquery += own[0]
    for gradient, computed in zip((dkey, dvalue), own[1:], strict=True):
        if gradient is not None:
            gradient.copy_(computed)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return SDPA's flash attention over the sequence, and its lse."""
    if query.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    else:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
    return out, lse[..., : query.shape[2]]


def _flash_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of the sequence's share, given out and lse of the whole."""
    if query.device.type == "cpu":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, query, key, value, out, lse, 0.0, causal, scale=scale
        )
        return dq, dk, dv
    # Undefined: offsets of packed sequences, and the state of a dropout that there is none of.
    state: Any = torch.empty(0, dtype=torch.int64, device=query.device)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        dout, query, key, value, out, lse, None, None, query.shape[2], key.shape[2], 0.0, causal,
        state, state, scale=scale,
    )  # fmt: skip
    return dq, dk, dv
