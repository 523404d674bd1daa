"""Launchers of the CUDA backend: the attention kernels of csrc/cuda/prefix*.cu.

Forward is one launch, backward up to four and the sums of parts: dq with delta, dk and dv, those of
the prefix, the gate's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_kernels.core import cuda_library, triton_runtime
from peft_kernels.core.rng import drop_threshold

# As in csrc/cuda/prefix_panel.h: keys of a tile, and bytes of the rows that meet them.
_HELD = 64
_STREAMED_BYTES = 128
_MOST_SPLITS = 64


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
    """Write out, lse and, where gated, prefix_lse in one launch; see ``reference.forward``."""
    cuda_library.call(
        "prefix_forward",
        query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed,
        *_options(query, key, causal, scale, window, dropout_p), out, lse, prefix_lse,
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

    Raises:
        ValueError: ``partial``: lse and out over more keys than the call's are not served.
    """
    if partial:
        raise ValueError("partial=True is not served by the CUDA backend: leave it False")
    batch, heads, queries, _ = query.shape
    splits, parts = 1, None
    if dprefix_key is not None or dprefix_value is not None:
        splits = _splits(query, prefix_key)
        if splits > 1:
            parts = lse.new_empty(2 * splits * prefix_key.numel())
    cuda_library.call(
        "prefix_backward",
        query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed,
        *_options(query, key, causal, scale, window, dropout_p), out, lse, prefix_lse,
        dout, dlse, lse.new_empty(2 if gate is None else 4, batch, heads, queries), splits, parts,
        dquery, dkey, dvalue, dprefix_key, dprefix_value, dgate,
    )  # fmt: skip


def _options(
    query: Tensor, key: Tensor, causal: bool, scale: float, window: int | None, dropout_p: float
) -> tuple[Any, ...]:
    # Wider windows hide nothing, and might overflow; 0 is none.
    widest = query.shape[2] + key.shape[2]
    return (
        causal, scale, 0 if window is None else min(window, widest), drop_threshold(dropout_p),
        1.0 / (1.0 - dropout_p),
    )  # fmt: skip


def _splits(query: Tensor, prefix: Tensor) -> int:
    """Return in how many parts the prefix's rows are summed: enough blocks to fill the GPU twice.

    A function of the shapes and the device alone, so that a run repeats bit for bit.
    """
    owners, kv_heads, length, _ = prefix.shape
    batch, heads, queries, _ = query.shape
    blocks = 8
    if query.device.type == "cuda":
        blocks = 2 * triton_runtime.multiprocessors(query.device.index or 0)
    own = max(1, owners * kv_heads * -(-length // _HELD))
    streamed = _STREAMED_BYTES // query.element_size()
    tiles = batch // owners * -(-(heads // kv_heads * queries) // streamed)
    return max(1, min(_MOST_SPLITS, blocks // own, tiles // 2))
