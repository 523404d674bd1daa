"""The arguments of the prefix attention launches, made of the tensors of a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels.core import prefix_tiles, tiles
from peft_kernels.core.prefix_tiles import PrefixTile
from peft_kernels.core.rng import drop_threshold

# Of a scale of 0: scores are then equal, and what is hidden still differs from what is seen.
_SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class Call:
    """The tensors of a call, and the arguments that its launches make of them."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    lse: Tensor
    seed: Tensor | None

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def precision(self) -> str:
        """Triton's input precision of the products."""
        return tiles.precision(self.query.dtype, self.query.device)

    def tile(self, launch: str, dout: Tensor | None = None) -> PrefixTile:
        """Return the tile of one launch: "forward", "query", "key" or "prefix".

        Args:
            launch: which one.
            dout: what "key" and "prefix" stream beside the queries.
        """

        def chosen(tma: bool) -> PrefixTile:
            return prefix_tiles.prefix_tile(
                self.query.device, self.query.dtype, self.query.shape[3], launch,
                self.seed is not None, tma,
            )  # fmt: skip

        if launch in ("forward", "query"):
            streamed = [self.key, self.value]
            if self.prefix_key.shape[2]:
                streamed += self.prefix_key, self.prefix_value
            return chosen(all(map(_describable, streamed)))
        tile = chosen(dout is not None and _describable(self.query) and _describable(dout))
        # Rows of several heads are no block of any tensor.
        return chosen(False) if tile.tma and self.fold(tile) else tile

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

    def prefix_blocks(self, tile: PrefixTile) -> dict[str, Any]:
        """Return how many prefix keys are taken at a time, and whether some do not fill that."""
        length = self.prefix_key.shape[2]
        block = prefix_tiles.prefix_block(length, tile)
        return {"BLOCK_P": block, "RAGGED_P": block > 0 and length % block != 0}

    def common(self, scale: float, dropout_p: float) -> dict[str, Any]:
        """Return what every launch but the gate's takes."""
        queries, head_size = self.query.shape[2:]
        stride_qb, stride_qh, stride_qm, _ = self.query.stride()
        base = 1.0 if self.query.dtype == torch.float32 else math.log2(math.e)
        return {
            "q_ptr": self.query, "lse_ptr": self.lse, "seed_ptr": some(self.seed, self.lse),
            "stride_qb": stride_qb, "stride_qh": stride_qh, "stride_qm": stride_qm,
            "S": queries, "T": self.key.shape[2], "P": self.prefix_key.shape[2],
            "kv_heads": self.key.shape[1], "group": self.group,
            "score_scale": max(abs(scale), _SMALLEST_SCALE) * base,
            "inverse_keep": 1.0 / (1.0 - dropout_p),
            "drop_threshold": drop_threshold(dropout_p) - 2**31,
            "D": head_size, "BLOCK_D": prefix_tiles.head_block(head_size),
            "DROPOUT": self.seed is not None, "NEGATE": scale < 0,
            "PRECISION": self.precision,
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
            "k_ptr": self.key, "v_ptr": self.value, "mask_ptr": some(key_mask, self.lse),
            "cu_seqlens_ptr": some(cu_seqlens, self.lse),
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

    def blocks(self, tile: PrefixTile, *, plain: bool = False) -> dict[str, Any]:
        """Return the sizes of a tile; ``plain``: the launch has no masks that take registers."""
        bound = {"maxnreg": tile.registers} if plain and tile.registers else {}
        return bound | {
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "FOLD": self.fold(tile),
            "num_warps": tile.num_warps, "num_stages": tile.num_stages, "TMA": tile.tma,
        }  # fmt: skip

    def streamed_keys(self, tile: PrefixTile) -> dict[str, Any]:
        """Return descriptors of keys, values and prefix, nothing for a tile without TMA.

        Where there is no prefix, what is never read is named by those of the keys.
        """
        if not tile.tma:
            return {}
        width = prefix_tiles.head_block(self.query.shape[3])
        k, v = (descriptor(each, tile.block_n, width) for each in (self.key, self.value))
        rows = prefix_tiles.prefix_block(self.prefix_key.shape[2], tile)
        prefix = (self.prefix_key, self.prefix_value)
        pk, pv = (descriptor(each, rows, width) for each in prefix) if rows else (k, v)
        return {"k_ptr": k, "v_ptr": v, "prefix_k_ptr": pk, "prefix_v_ptr": pv}

    def streamed_rows(
        self, tile: PrefixTile, dout: Tensor, lse: Tensor, delta: Tensor
    ) -> dict[str, Any]:
        """Return queries, dout, lse and delta, as descriptors where the tile is by TMA.

        Each row's numbers can be described where those of a head start at multiples of 16 bytes.
        """
        rows = self.query.shape[2] * (self.group if self.fold(tile) else 1)
        given = {"lse_ptr": lse, "delta_ptr": delta, "LSE_TMA": False}
        given["RAGGED"] = rows % tile.block_m != 0
        if not tile.tma:
            return given
        width = prefix_tiles.head_block(self.query.shape[3])
        q, do = (descriptor(each, tile.block_m, width) for each in (self.query, dout))
        by_head = [each.view(-1, each.shape[2]) for each in (lse, delta)]
        if all(_aligned(each, each.stride()[:1]) for each in by_head):
            lse, delta = (TensorDescriptor.from_tensor(t, [1, tile.block_m]) for t in by_head)
            given |= {"lse_ptr": lse, "delta_ptr": delta, "LSE_TMA": True}
        return given | {"q_ptr": q, "dout_ptr": do}


def _describable(t: Tensor) -> bool:
    """Return whether a tensor descriptor may name ``t`` [b, h, n, d]."""
    pitches = [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1][:-1]
    return t.numel() > 0 and t.stride(3) == 1 and _aligned(t, pitches)


def _aligned(t: Tensor, pitches: Sequence[int]) -> bool:
    """Return whether TMA can address ``t``: by multiples of 16 bytes, and no pitch of 0."""
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and all(
        0 < pitch * size < 1 << 40 and pitch * size % 16 == 0 for pitch in pitches
    )


def descriptor(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Return what names blocks of ``rows`` rows of one head of ``t`` [b, h, n, d], zeros beyond."""
    # The stride of a single index is never used, and may be anything.
    strides = [s if n > 1 else t.shape[3] for n, s in zip(t.shape, t.stride(), strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides[:3], 1], [1, 1, rows, width])


def some(value: Tensor | None, otherwise: Tensor) -> Tensor:
    """Return a value, or what stands for it where it is never read but must be some pointer."""
    return otherwise if value is None else value
