"""Launchers of the prefix attention kernels: pick the tile, the grid and the operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from peft_kernels.core import prefix_tiles, triton_runtime
from peft_kernels.core.launches import counters, launch, remembered
from peft_kernels.prefix import (
    kernels,
    key_gradient_kernels,
    query_gradient_kernels,
    reference,
)
from peft_kernels.prefix.alignment import call_aligned
from peft_kernels.prefix.arguments import Call, some


@remembered
def prefix_forward(
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
    """Write out [B, Hq, S, d], lse [B, Hq, S] and, where gated, prefix_lse in one launch."""
    arguments = (
        query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed, causal,
        scale, window, dropout_p, out, lse, prefix_lse,
    )  # fmt: skip
    call = Call(query, key, value, prefix_key, prefix_value, lse, seed)
    tile = call.tile("forward")
    if tile == prefix_tiles.LIBRARY:
        reference.forward(*arguments)
        return
    if call_aligned(prefix_forward, arguments, range(5), (13,)):
        return
    keys = call.keys(key_mask, cu_seqlens, causal, window)
    with torch.cuda.device_of(query):
        launch(
            kernels._prefix_forward_kernel,
            (call.row_programs(tile),),
            gate_ptr=some(gate, lse),
            out_ptr=out,
            prefix_lse_ptr=some(prefix_lse, lse),
            GATED=gate is not None,
            **call.common(scale, dropout_p),
            **keys | call.prefix() | call.prefix_blocks(tile) | call.streamed_keys(tile),
            **call.blocks(tile, plain=_plain(key_mask, cu_seqlens, window, gate)),
        )


@remembered
def prefix_backward(
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
    """Write the gradients that are not None: dq, then dk and dv, then those of the prefix.

    The first launch makes delta too, and of exact float32 products the correction of lse. Only
    gradients of values need neither elsewhere. ``partial``: lse and out are over more keys than the
    call's (``split``), of which exact products have no form.
    """
    arguments = (
        dout, dlse, query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate,
        seed, out, lse, prefix_lse, causal, scale, window, dropout_p, dquery, dkey, dvalue,
        dprefix_key, dprefix_value, dgate,
    )  # fmt: skip
    call = Call(query, key, value, prefix_key, prefix_value, lse, seed)
    if call.tile("query") == prefix_tiles.LIBRARY:
        reference.backward(*arguments)
        return
    if call_aligned(prefix_backward, arguments, (0, *range(2, 7)), range(18, 23), (11,)):
        return
    delta = torch.empty_like(lse)
    prefix_delta = torch.empty_like(lse) if gate is not None else delta
    exact = query.dtype == torch.float32 and call.precision == "ieee"
    correction = torch.empty_like(lse) if exact else lse
    prefix_correction = torch.empty_like(lse) if exact and gate is not None else correction
    common = call.common(scale, dropout_p) | {
        "dout_ptr": dout, "delta_ptr": delta, "correction_ptr": correction, "scale": scale,
        "dlse_ptr": some(dlse, lse), "HAS_DLSE": dlse is not None,
        "stride_ob": dout.stride(0), "stride_oh": dout.stride(1), "stride_om": dout.stride(2),
    }  # fmt: skip
    keys = call.keys(key_mask, cu_seqlens, causal, window)
    plain = _plain(key_mask, cu_seqlens, window, gate)
    with torch.cuda.device_of(query):
        if exact or any(each is not None for each in (dquery, dkey, dprefix_key, dgate)):
            tile = call.tile("query")
            launch(
                query_gradient_kernels._prefix_query_gradient_kernel,
                (call.row_programs(tile),),
                gate_ptr=some(gate, lse),
                out_ptr=out,
                prefix_lse_ptr=some(prefix_lse, lse),
                dq_ptr=some(dquery, out),
                prefix_delta_ptr=prefix_delta,
                prefix_correction_ptr=prefix_correction,
                GATED=gate is not None,
                NEED_DQ=dquery is not None,
                **common,
                **keys | call.prefix() | call.prefix_blocks(tile) | call.streamed_keys(tile),
                **call.blocks(tile, plain=plain),
            )
        if (dkey is not None or dvalue is not None) and key.shape[2]:
            tile = call.tile("key", dout)
            programs = key.shape[0] * key.shape[1] * triton.cdiv(key.shape[2], tile.block_n)
            launch(
                key_gradient_kernels._prefix_key_gradient_kernel,
                (programs,),
                dk_ptr=some(dkey, out),
                dv_ptr=some(dvalue, out),
                NEED_DK=dkey is not None,
                NEED_DV=dvalue is not None,
                **common | call.streamed_rows(tile, dout, lse, delta),
                **keys,
                **call.blocks(tile, plain=plain),
            )
        if (dprefix_key is not None or dprefix_value is not None) and prefix_key.shape[2]:
            if gate is not None:
                common |= {
                    "lse_ptr": prefix_lse, "delta_ptr": prefix_delta,
                    "correction_ptr": prefix_correction, "HAS_DLSE": False,
                }  # fmt: skip
            _prefix_gradient(call, common, dout, gate, dprefix_key, dprefix_value)
        if dgate is not None and gate is not None:
            batch, heads, queries, _ = query.shape
            launch(
                query_gradient_kernels._gate_gradient_kernel, (heads,),
                prefix_delta, gate, dgate, batch, heads, queries,
                BLOCK=prefix_tiles.GATE_BLOCK, num_warps=4,
            )  # fmt: skip


def _prefix_gradient(
    call: Call,
    common: Mapping[str, Any],
    dout: Tensor,
    gate: Tensor | None,
    dprefix_key: Tensor | None,
    dprefix_value: Tensor | None,
) -> None:
    """Write the prefix's gradients in one launch, whose last programs to arrive add the parts."""
    tile = call.tile("prefix", dout)
    owners, kv_heads, length, size = call.prefix_key.shape
    sharing = call.query.shape[0] // owners
    fold = call.fold(tile)
    rows = call.query.shape[1] // kv_heads * call.query.shape[2]
    tiles_of_rows = (
        triton.cdiv(rows, tile.block_m)
        if fold
        else rows // call.query.shape[2] * triton.cdiv(call.query.shape[2], tile.block_m)
    )
    programs = triton.cdiv(length, tile.block_n) * owners * kv_heads
    splits = _splits(sharing * tiles_of_rows, programs, call.query.device)
    device = call.query.device

    def parts(wanted: Tensor | None) -> Tensor:
        if wanted is None or splits == 1:
            return call.lse
        return torch.empty(splits * wanted.numel(), dtype=torch.float32, device=device)

    launch(
        key_gradient_kernels._prefix_gradient_kernel,
        (triton.cdiv(length, tile.block_n), owners * kv_heads, splits),
        gate_ptr=some(gate, call.lse),
        dk_ptr=some(dprefix_key, call.lse),
        dv_ptr=some(dprefix_value, call.lse),
        dk_part_ptr=parts(dprefix_key),
        dv_part_ptr=parts(dprefix_value),
        counters_ptr=counters(device, programs),
        B=sharing,
        SPLITS=splits,
        GATED=gate is not None,
        NEED_DK=dprefix_key is not None,
        NEED_DV=dprefix_value is not None,
        **dict(common) | call.streamed_rows(tile, dout, common["lse_ptr"], common["delta_ptr"]),
        **call.prefix(),
        **call.blocks(tile, plain=gate is None),
    )


def _plain(
    key_mask: Tensor | None, cu_seqlens: Tensor | None, window: int | None, gate: Tensor | None
) -> bool:
    """Return whether a launch has no more than a causal mask."""
    return key_mask is None and cu_seqlens is None and window is None and gate is None


def _splits(row_tiles: int, programs: int, device: torch.device) -> int:
    """Return in how many parts the rows are summed: enough programs to fill the GPU twice.

    A power of two, so that few variants of the kernel are compiled; a function of the shapes and
    the device alone, so that a run repeats bit for bit.
    """
    wanted = 8 if device.type != "cuda" else 2 * triton_runtime.multiprocessors(device.index or 0)
    splits = 1
    while splits < 64 and splits * programs < wanted and splits * 4 <= row_tiles:
        splits *= 2
    return splits
