"""Which launches several LoRA projections of one x take: grouped ones, or one by one, and why.

The tiles are LoRA's own (``lora_tiles``): a grouped launch runs the tile that its widest rank would
take alone, by pointers.
"""

from __future__ import annotations

import torch

from peft_kernels.core import lora_tiles
from peft_kernels.core.lora_tiles import LoRATile, lora_tile

MOST = 4  # projections of one launch


def projections_tile(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    rank: int,
    direction: str,
    aligned: bool,
    one_layout: bool,
) -> LoRATile | str:
    """Return the tile of a grouped launch, or why there is none.

    Args:
        device: where.
        dtype: float32, float16 or bfloat16.
        tokens: M.
        rank: the largest r.
        direction: "forward" or "backward", under dropout "dropped" or "masked".
        aligned: whether sizes, strides and addresses allow unmasked asynchronous copies.
        one_layout: whether all weights are row-major, or none is.
    """
    if not one_layout:
        return "the weights are not all row-major"
    onward = direction in ("forward", "dropped")
    if onward and lora_tile(device, dtype, tokens, rank, direction, aligned).variant == (
        "ticket_tma"
    ):
        return "TMA is faster one by one than pointers in one launch"
    # dX of a few tokens takes the next larger tile: no tile that makes its own s has several.
    tile = lora_tile(
        device, dtype, tokens if onward else max(tokens, 17), rank, direction, aligned, tma=False
    )
    if tile.variant == "split":
        return "the GEMM library multiplies exact float32"
    if tile.variant == "recompute":
        return "a few tokens make their own s"
    return tile


def common_ranks(rank: int, count: int) -> int:
    """Return how many ranks of each projection the common product of s takes at a time.

    At most 64 columns: more of them spill beside a tile. Every projection has as many.
    """
    return min(lora_tiles.rank_block(rank), 64 // (1 if count == 1 else 2 if count == 2 else 4))


def projections_plan(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    in_features: int,
    out_features: tuple[int, ...],
    ranks: tuple[int, ...],
    dropout: tuple[bool, ...],
    one_layout: bool,
) -> str:
    """Return how forward and backward run, for ``explain``."""
    count = len(ranks)
    if count == 1:
        (width,), (rank,), (dropped,) = out_features, ranks, dropout
        return lora_tiles.lora_plan(device, dtype, tokens, in_features, width, rank, dropped)
    there, back = ("dropped", "masked") if any(dropout) else ("forward", "backward")
    rank = max(ranks)
    even = in_features % 64 == 0 and all(width % 16 == 0 for width in out_features)
    forward = projections_tile(device, dtype, tokens, rank, there, even, one_layout)
    even = in_features % 16 == 0 and all(width % 64 == 0 for width in out_features)
    backward = projections_tile(device, dtype, tokens, rank, back, even, one_layout)
    return (
        f"forward {_launches(forward, count)}; dX {_launches(backward, count)}; "
        f"dA, dB, dbias one by one"
    )


def _launches(tile: LoRATile | str, count: int) -> str:
    if isinstance(tile, str):
        return f"one by one: {tile}"
    launches = -(-count // MOST)
    return f"{tile}, {launches} launch{'es' if launches > 1 else ''} for {count} projections"
