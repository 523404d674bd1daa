"""Launchers of the prefix attention kernels: pick the tile, the grid and the operands."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from peft_kernels.core import prefix_tiles, tiles, triton_runtime
from peft_kernels.core.prefix_tiles import PrefixTile
from peft_kernels.core.rng import drop_threshold
from peft_kernels.prefix import backward_kernels, kernels, reference

# Of a scale of 0: scores are then equal, and what is hidden still differs from what is seen.
_SMALLEST_SCALE = 1e-30


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
    call = _Call(query, key, value, prefix_key, prefix_value, lse, seed)
    tile = call.tile("forward")
    if tile == prefix_tiles.LIBRARY:
        reference.forward(
            query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed, causal,
            scale, window, dropout_p, out, lse, prefix_lse,
        )  # fmt: skip
        return
    with torch.cuda.device_of(query):
        kernels._prefix_forward_kernel[(call.row_programs(tile),)](
            gate_ptr=_some(gate, lse),
            out_ptr=out,
            prefix_lse_ptr=_some(prefix_lse, lse),
            BLOCK_P=call.prefix_block(tile),
            GATED=gate is not None,
            **call.common(scale, dropout_p),
            **call.keys(key_mask, cu_seqlens, causal, window),
            **call.prefix(),
            **call.blocks(tile),
        )


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
) -> None:
    """Write the gradients that are not None: dq, then dk and dv, then those of the prefix.

    The first launch makes delta too, and in float32 the correction of lse. Only gradients of values
    in 16 bits need neither.
    """
    call = _Call(query, key, value, prefix_key, prefix_value, lse, seed, dout)
    if call.tile("query") == prefix_tiles.LIBRARY:
        reference.backward(
            dout, dlse, query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate,
            seed, out, lse, prefix_lse, causal, scale, window, dropout_p, dquery, dkey, dvalue,
            dprefix_key, dprefix_value, dgate,
        )  # fmt: skip
        return
    delta = torch.empty_like(lse)
    prefix_delta = torch.empty_like(lse) if gate is not None else delta
    exact = query.dtype == torch.float32
    correction = torch.empty_like(lse) if exact else lse
    prefix_correction = torch.empty_like(lse) if exact and gate is not None else correction
    common = call.common(scale, dropout_p) | {
        "dout_ptr": dout, "delta_ptr": delta, "correction_ptr": correction, "scale": scale,
        "stride_ob": dout.stride(0), "stride_oh": dout.stride(1), "stride_om": dout.stride(2),
    }  # fmt: skip
    keys = call.keys(key_mask, cu_seqlens, causal, window)
    with torch.cuda.device_of(query):
        if exact or any(each is not None for each in (dquery, dkey, dprefix_key, dgate)):
            tile = call.tile("query")
            backward_kernels._prefix_query_gradient_kernel[(call.row_programs(tile),)](
                dlse_ptr=_some(dlse, lse),
                gate_ptr=_some(gate, lse),
                out_ptr=out,
                prefix_lse_ptr=_some(prefix_lse, lse),
                dq_ptr=_some(dquery, out),
                prefix_delta_ptr=prefix_delta,
                prefix_correction_ptr=prefix_correction,
                BLOCK_P=call.prefix_block(tile),
                GATED=gate is not None,
                HAS_DLSE=dlse is not None,
                NEED_DQ=dquery is not None,
                **common,
                **keys,
                **call.prefix(),
                **call.blocks(tile),
            )
        if (dkey is not None or dvalue is not None) and key.shape[2]:
            tile = call.tile("key")
            programs = key.shape[0] * key.shape[1] * triton.cdiv(key.shape[2], tile.block_n)
            backward_kernels._prefix_key_gradient_kernel[(programs,)](
                dk_ptr=_some(dkey, out),
                dv_ptr=_some(dvalue, out),
                NEED_DK=dkey is not None,
                NEED_DV=dvalue is not None,
                **common,
                **keys,
                **call.blocks(tile),
            )
        if (dprefix_key is not None or dprefix_value is not None) and prefix_key.shape[2]:
            if gate is not None:
                common |= {
                    "lse_ptr": prefix_lse, "delta_ptr": prefix_delta,
                    "correction_ptr": prefix_correction,
                }  # fmt: skip
            _prefix_gradient(call, common, gate, dprefix_key, dprefix_value)
        if dgate is not None and gate is not None:
            batch, heads, queries, _ = query.shape
            backward_kernels._gate_gradient_kernel[(heads,)](
                prefix_delta, gate, dgate, batch, heads, queries,
                BLOCK=prefix_tiles.GATE_BLOCK, num_warps=4,
            )  # fmt: skip


def _prefix_gradient(
    call: _Call,
    common: Mapping[str, Any],
    gate: Tensor | None,
    dprefix_key: Tensor | None,
    dprefix_value: Tensor | None,
) -> None:
    """Write the prefix's gradients in one launch, whose last programs to arrive add the parts."""
    tile = call.tile("prefix")
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

    backward_kernels._prefix_gradient_kernel[
        (triton.cdiv(length, tile.block_n), owners * kv_heads, splits)
    ](
        gate_ptr=_some(gate, call.lse),
        dk_ptr=_some(dprefix_key, call.lse),
        dv_ptr=_some(dprefix_value, call.lse),
        dk_part_ptr=parts(dprefix_key),
        dv_part_ptr=parts(dprefix_value),
        counters_ptr=triton_runtime.counters(device, programs),
        B=sharing,
        SPLITS=splits,
        GATED=gate is not None,
        NEED_DK=dprefix_key is not None,
        NEED_DV=dprefix_value is not None,
        **common,
        **call.prefix(),
        **call.blocks(tile),
    )


@dataclass(frozen=True)
class _Call:
    """The tensors of a call, and the arguments that its launches make of them."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    lse: Tensor
    seed: Tensor | None
    dout: Tensor | None = None

    @functools.cached_property
    def aligned(self) -> bool:
        """Whether rows start at multiples of 16 elements, so that copies can be asynchronous."""
        operands = (self.query, self.key, self.value, self.prefix_key, self.prefix_value, self.dout)
        return all(
            t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in t.stride()[:-1])
            for t in operands
            if t is not None and t.numel()
        )

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.query.shape[1] // self.key.shape[1]

    def tile(self, launch: str) -> PrefixTile:
        """Return the tile of one launch: "forward", "query", "key" or "prefix"."""
        return prefix_tiles.prefix_tile(
            self.query.device, self.query.dtype, self.query.shape[3], launch,
            self.seed is not None, self.aligned,
        )  # fmt: skip

    def fold(self, tile: PrefixTile) -> bool:
        """Return whether a tile holds rows of several heads: of few queries."""
        return self.group > 1 and 2 * self.query.shape[2] <= tile.block_m

    def row_programs(self, tile: PrefixTile) -> int:
        """Return the programs that hold a tile of rows each."""
        batch, heads, queries, _ = self.query.shape
        if self.fold(tile):
            kv_heads = self.key.shape[1]
            return batch * kv_heads * triton.cdiv(self.group * queries, tile.block_m)
        return batch * heads * triton.cdiv(queries, tile.block_m)

    def prefix_block(self, tile: PrefixTile) -> int:
        """Return how many prefix keys are taken at a time: no more than there are, 0 of none."""
        return prefix_tiles.prefix_block(self.prefix_key.shape[2], tile)

    def common(self, scale: float, dropout_p: float) -> dict[str, Any]:
        """Return what every launch but the gate's takes."""
        queries, head_size = self.query.shape[2:]
        stride_qb, stride_qh, stride_qm, _ = self.query.stride()
        base = 1.0 if self.query.dtype == torch.float32 else math.log2(math.e)
        return {
            "q_ptr": self.query, "lse_ptr": self.lse, "seed_ptr": _some(self.seed, self.lse),
            "stride_qb": stride_qb, "stride_qh": stride_qh, "stride_qm": stride_qm,
            "S": queries, "T": self.key.shape[2], "P": self.prefix_key.shape[2],
            "kv_heads": self.key.shape[1], "group": self.group,
            "score_scale": max(abs(scale), _SMALLEST_SCALE) * base,
            "inverse_keep": 1.0 / (1.0 - dropout_p),
            "drop_threshold": drop_threshold(dropout_p) - 2**31,
            "D": head_size, "BLOCK_D": prefix_tiles.head_block(head_size),
            "DROPOUT": self.seed is not None, "NEGATE": scale < 0,
            "PRECISION": tiles.precision(self.query.dtype, self.query.device),
        }  # fmt: skip

    def keys(
        self,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        causal: bool,
        window: int | None,
    ) -> dict[str, Any]:
        """Return keys, values and who sees them."""
        stride_kb, stride_kh, stride_kn, _ = self.key.stride()
        stride_vb, stride_vh, stride_vn, _ = self.value.stride()
        stride_mask_b, stride_mask = (0, 0) if key_mask is None else key_mask.stride()
        segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        # Wider windows hide nothing, and might overflow.
        widest = self.query.shape[2] + self.key.shape[2]
        return {
            "k_ptr": self.key, "v_ptr": self.value, "mask_ptr": _some(key_mask, self.lse),
            "cu_seqlens_ptr": _some(cu_seqlens, self.lse),
            "stride_kb": stride_kb, "stride_kh": stride_kh, "stride_kn": stride_kn,
            "stride_vb": stride_vb, "stride_vh": stride_vh, "stride_vn": stride_vn,
            "stride_mask_b": stride_mask_b, "stride_mask": stride_mask,
            "window": widest if window is None else min(window, widest),
            "segments": segments, "steps": (segments - 1).bit_length(),
            "CAUSAL": causal, "WINDOW": window is not None, "PACKED": cu_seqlens is not None,
            "KEY_MASK": key_mask is not None,
        }  # fmt: skip

    def prefix(self) -> dict[str, Any]:
        """Return the prefix; one that all batch rows share has a stride of 0."""
        shared = self.prefix_key.shape[0] == 1
        stride_pkb, stride_pkh, stride_pkn, _ = self.prefix_key.stride()
        stride_pvb, stride_pvh, stride_pvn, _ = self.prefix_value.stride()
        return {
            "prefix_k_ptr": self.prefix_key, "prefix_v_ptr": self.prefix_value,
            "stride_pkb": 0 if shared else stride_pkb, "stride_pkh": stride_pkh,
            "stride_pkn": stride_pkn, "stride_pvb": 0 if shared else stride_pvb,
            "stride_pvh": stride_pvh, "stride_pvn": stride_pvn,
        }  # fmt: skip

    def blocks(self, tile: PrefixTile) -> dict[str, Any]:
        """Return the sizes of a tile."""
        return {
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "FOLD": self.fold(tile),
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip


def _some(value: Tensor | None, otherwise: Tensor) -> Tensor:
    # What is never read must still be some pointer.
    return otherwise if value is None else value


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
