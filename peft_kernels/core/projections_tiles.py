"""Which launches several LoRA projections of one x take: grouped ones, or one by one, and why.

The tiles are LoRA's own (``lora_tiles``): a grouped launch runs the tile that its widest rank would
take alone, by pointers, or a smaller one where that spills. Which is fastest was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from peft_kernels.core import lora_tiles, overrides, tiles, triton_runtime
from peft_kernels.core.lora_tables import FEW_RANKS, LoRATile
from peft_kernels.core.lora_tiles import lora_tile

MOST = 4  # projections of one launch


@dataclass(frozen=True)
class Smaller:
    """A change to tiles that spill in a grouped launch.

    Attributes:
        families: that it is for.
        directions: likewise.
        sizes: of the tiles that it is for, by name.
        becomes: what it makes of them.
        many_ranks: it is for ranks above 16 alone.
    """

    families: tuple[str, ...]
    directions: tuple[str, ...]
    sizes: dict[str, int]
    becomes: dict[str, Any]
    many_ranks: bool = False

    def concerns(self, family: str, direction: str, rank: int, tile: LoRATile) -> bool:
        """Return whether a tile is changed."""
        meant = family in self.families and direction in self.directions
        sized = all(getattr(tile, name) == size for name, size in self.sizes.items())
        return meant and sized and (rank > FEW_RANKS or not self.many_ranks)


# Applied one after the other. The first and the third are float32's.
SMALLER = (
    Smaller(
        tiles.FAMILIES, ("backward",), {"block_m": 128, "block_n": 64, "block_k": 32},
        {"block_m": 64, "num_warps": 4},
    ),
    Smaller(("sm_100", "sm_120"), ("backward",), {"block_m": 64}, {"block_k": 32}),
    Smaller(("sm_100",), ("masked",), {"block_k": 32}, {"num_warps": 8}, True),
    Smaller(("sm_90",), ("forward", "dropped"), {"block_n": 256}, {"block_n": 128}),
    Smaller(("sm_90",), ("dropped",), {"block_m": 128}, {"block_k": 32}, True),
)  # fmt: skip


def projections_tile(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    rank: int,
    direction: str,
    aligned: bool,
    one_layout: bool,
    work: float = math.inf,
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
        work: multiply-adds of all base products together.
    """
    if not one_layout:
        return "the weights are not all row-major"
    onward = direction in ("forward", "dropped")
    alone = lora_tile(device, dtype, tokens, rank, direction, aligned, work=work)
    # On an H200, gate and up of 2048 tokens: dX together took 0.97 of the time, masked 1.11.
    if direction != "backward" and alone.variant == "ticket_tma":
        return "TMA is faster one by one than pointers in one launch"
    # dX of a few tokens takes the next larger tile: no tile that makes its own s has several.
    tile = lora_tile(
        device, dtype, tokens if onward else max(tokens, 17), rank, direction, aligned, tma=False
    )
    if tile.variant == "split":
        return "the GEMM library multiplies exact float32"
    if tile.variant == "recompute":
        return "a few tokens make their own s"
    if device.type != "cuda":
        return tile
    return grouped(tiles.family(device), direction, rank, tile)


def serves(device: torch.device) -> bool:
    """Return whether a backend has grouped launches there.

    Where none has, layers run by themselves are quicker: on a CPU, three small ones by 20 us of 85.
    """
    return device.type == "cuda" and triton_runtime.import_problem() is None


def pays_dropped(
    device: torch.device, dtype: torch.dtype, tokens: int, in_features: int, out_features: int
) -> bool:
    """Return whether layers of one x, ``out_features`` together, run quicker as one under dropout.

    Not where TMA serves each of them: a training step then took 3% longer on an H200.
    """
    work = tokens * in_features * out_features
    return lora_tile(device, dtype, tokens, 16, "masked", work=work).variant != "ticket_tma"


def grouped(family: str, direction: str, rank: int, tile: LoRATile) -> LoRATile:
    """Return ``tile``, or a smaller one where the pointers of several projections make it spill."""
    for smaller in SMALLER:
        if smaller.concerns(family, direction, rank, tile):
            tile = replace(tile, **smaller.becomes)
    return tile


def projections_cases(family: str, dtype: str) -> Iterator[tuple[str, str, int, LoRATile]]:
    """Yield (shape class, direction, rank, tile) of every grouped launch that can be chosen."""
    for each, kind, shape_class, tile in lora_tiles.lora_cases():
        if (each, kind) != (family, dtype) or tile.variant != "ticket":
            continue
        rank = 64 if shape_class.endswith("+") else 16
        name = shape_class.removesuffix("+")
        for direction in _DIRECTIONS[name]:
            yield shape_class, direction, rank, grouped(family, direction, rank, tile)


_DIRECTIONS = {
    "small": ("forward", "dropped", "backward", "masked"),
    "unaligned": ("forward", "dropped", "backward", "masked"),
    "large": ("forward", "dropped"),
    "backward": ("backward",),
    "masked": ("masked",),
}


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
    work = tokens * in_features * sum(out_features)
    forward = projections_tile(device, dtype, tokens, rank, there, even, one_layout, work)
    even = in_features % 16 == 0 and all(width % 64 == 0 for width in out_features)
    backward = projections_tile(device, dtype, tokens, rank, back, even, one_layout, work)
    return (
        f"forward {_launches(forward, count)}; dX {_launches(backward, count)}; "
        f"dA, dB, dbias one by one" + overrides.note(tiles.table_of(device), "lora")
    )


def _launches(tile: LoRATile | str, count: int) -> str:
    if isinstance(tile, str):
        return f"one by one: {tile}"
    launches = -(-count // MOST)
    return f"{tile}, {launches} launch{'es' if launches > 1 else ''} for {count} projections"
