"""Launchers of the C++ CPU backend: strides and pointers of a call; ``_C`` does the rest."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peft_kernels.core import extension, rng
from peft_kernels.core.operands import pointer


def why_not(spec: Any) -> str | None:
    """Return the reason against this backend for a spec, or None."""
    return extension.why_not_products(spec.dtype)


def _heads(module: ModuleType, x: Tensor) -> Any:
    """Return where [B, H, rows, d] lies; a batch of one has no stride: it is shared."""
    batch, head, row, _ = x.stride()
    return module.PrefixHeads(x.data_ptr(), 0 if x.shape[0] == 1 else batch, head, row)


def _call(
    module: ModuleType,
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
    partial: bool = False,
) -> Any:
    batch, heads, queries, head_size = query.shape
    return module.PrefixCall(
        query.dtype is torch.bfloat16, batch, heads, key.shape[1], queries, key.shape[2],
        prefix_key.shape[2], head_size,
        *(_heads(module, each) for each in (query, key, value, prefix_key, prefix_value)),
        prefix_key.shape[0] == 1,
        pointer(key_mask), pointer(cu_seqlens), 0 if cu_seqlens is None else len(cu_seqlens) - 1,
        pointer(gate), pointer(seed), rng.drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        causal, window or 0, scale, lse.data_ptr(), pointer(prefix_lse), out.data_ptr(), partial,
    )  # fmt: skip


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
    """Write out, lse and, where gated, prefix_lse; see ``reference.forward``."""
    module = extension.load()
    module.prefix_forward(
        _call(
            module, query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed,
            causal, scale, window, dropout_p, out, lse, prefix_lse,
        )
    )  # fmt: skip


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
    *,
    partial: bool = False,
) -> None:
    """Write the gradients that are not None; see ``reference.backward``.

    ``partial``: lse and out are over more keys than the call's (``split``), so that its softmax has
    not to be one by itself.
    """
    module = extension.load()
    call = _call(
        module, query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed,
        causal, scale, window, dropout_p, out, lse, prefix_lse, partial,
    )  # fmt: skip
    module.prefix_backward(
        call, _heads(module, dout), pointer(dlse),
        pointer(dquery), pointer(dkey), pointer(dvalue),
        *_prefix_sums(dprefix_key), *_prefix_sums(dprefix_value), pointer(dgate),
    )  # fmt: skip


def _prefix_sums(gradient: Tensor | None) -> tuple[int, bool]:
    """Return where the sums of a prefix go, and whether they are rounded to bfloat16."""
    return pointer(gradient), gradient is not None and gradient.dtype is torch.bfloat16
