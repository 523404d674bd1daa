"""Tile table of the bottleneck adapter, per GPU family and shape class.

Data, not code. Every tile here cross-compiles without spills for its families
(``tests/compile``). Those of sm_90 for many tokens in 16 bits and r = 16, 64 and 128 are the
fastest of some forty candidates each on an H200 that have no spills; the rest is reasoned from the
sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from peft_kernels.core import overrides, tiles
from peft_kernels.core.tiles import ReductionTile

# Ranks that a program holds at most; above, the products are the GEMM library's.
MAX_BOTTLENECK = 256
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class AdapterTile:
    """How one launch of an adapter runs.

    Attributes:
        variant: "fused", or "library" (library GEMMs and eager epilogues: bottlenecks above 256,
            and exact float32 products).
        block_m: rows (tokens) of a program.
        block_d: features that it streams at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        ahead: whether what is added to a product is loaded before it, which takes registers:
            on Hopper, where it was measured.
    """

    variant: str
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    ahead: bool = False

    def __str__(self) -> str:
        """Return variant and sizes in short."""
        if self.variant == "library":
            return "library: GEMMs of bottlenecks above 256 and of exact float32 are the library's"
        return (
            f"fused {self.block_m}x{self.block_d}, {self.num_warps} warps, {self.num_stages} stages"
        )


LIBRARY = AdapterTile("library", 0, 0, 0, 0)
_INTERPRETED = AdapterTile("fused", 32, 32, 4, 1, ahead=True)

# By the columns of the block that holds the bottleneck. A program streams the weights once, so
# many rows save traffic from L2; "few" tokens need small row blocks to keep the GPU busy. Where D
# or r is "ragged", no multiple of 16, every element has an address and a mask of its own.
_16BIT = {
    "few": {
        16: AdapterTile("fused", 16, 128, 4, 3),
        32: AdapterTile("fused", 16, 128, 4, 3),
        64: AdapterTile("fused", 16, 128, 4, 3),
        128: AdapterTile("fused", 16, 64, 4, 3),
        256: AdapterTile("fused", 16, 64, 4, 2),
    },
    "many": {
        16: AdapterTile("fused", 64, 128, 8, 3),
        32: AdapterTile("fused", 64, 128, 8, 3),
        64: AdapterTile("fused", 64, 128, 8, 3),
        128: AdapterTile("fused", 64, 128, 8, 2),
        256: AdapterTile("fused", 64, 64, 8, 2),
    },
    "ragged": {
        16: AdapterTile("fused", 32, 64, 8, 2),
        32: AdapterTile("fused", 32, 64, 8, 2),
        64: AdapterTile("fused", 32, 64, 8, 2),
        128: AdapterTile("fused", 16, 64, 8, 2),
        256: AdapterTile("fused", 16, 32, 8, 2),
    },
}
# float32 with tf32 products.
_32BIT = {
    "few": {
        16: AdapterTile("fused", 16, 64, 4, 3),
        32: AdapterTile("fused", 16, 64, 4, 3),
        64: AdapterTile("fused", 16, 32, 4, 3),
        128: AdapterTile("fused", 16, 32, 4, 3),
        256: AdapterTile("fused", 16, 32, 4, 2),
    },
    "many": {
        16: AdapterTile("fused", 64, 64, 8, 3),
        32: AdapterTile("fused", 64, 32, 8, 3),
        64: AdapterTile("fused", 64, 64, 8, 3),
        128: AdapterTile("fused", 64, 32, 8, 2),
        256: AdapterTile("fused", 32, 32, 8, 2),
    },
    "ragged": {
        16: AdapterTile("fused", 32, 32, 8, 2),
        32: AdapterTile("fused", 32, 32, 8, 2),
        64: AdapterTile("fused", 32, 32, 8, 2),
        128: AdapterTile("fused", 16, 32, 8, 2),
        256: AdapterTile("fused", 16, 32, 8, 2),
    },
}
# What the tables above are overruled by: (width, shape class, direction, block) -> tile, of all
# families and of one. Backward holds pre and dpre at once, and a mask beside the tile of dy.
_EXCEPTIONS: dict[tuple[str, str, str, int], AdapterTile] = {
    ("16bit", "few", "backward", 16): AdapterTile("fused", 16, 64, 4, 3),
    ("16bit", "few", "backward", 256): AdapterTile("fused", 16, 64, 8, 2),
    ("16bit", "many", "backward", 16): AdapterTile("fused", 64, 64, 8, 3),
    ("16bit", "many", "backward", 32): AdapterTile("fused", 64, 64, 8, 3),
    ("16bit", "many", "backward", 128): AdapterTile("fused", 64, 64, 8, 2),
    ("16bit", "many", "backward", 256): AdapterTile("fused", 32, 64, 8, 2),
    ("16bit", "many", "forward", 256): AdapterTile("fused", 32, 64, 8, 2),
}
_FAMILY_EXCEPTIONS: dict[str, dict[tuple[str, str, str, int], AdapterTile]] = {
    "sm_90": {
        ("16bit", "many", "forward", 16): AdapterTile("fused", 32, 128, 4, 3),
        ("16bit", "many", "backward", 16): AdapterTile("fused", 32, 128, 4, 3),
        ("16bit", "many", "backward", 32): AdapterTile("fused", 64, 128, 4, 3),
        ("16bit", "many", "forward", 128): AdapterTile("fused", 64, 64, 8, 4),
        ("16bit", "many", "backward", 128): AdapterTile("fused", 64, 64, 8, 4),
    },
    "sm_120": {
        ("fp32", "many", "forward", 64): AdapterTile("fused", 32, 64, 4, 2),
        ("fp32", "many", "forward", 128): AdapterTile("fused", 32, 32, 8, 2),
        ("fp32", "many", "backward", 16): AdapterTile("fused", 32, 64, 4, 3),
        ("fp32", "ragged", "backward", 64): AdapterTile("fused", 32, 32, 4, 2),
    },
    "sm_100": {
        ("fp32", "many", "forward", 128): AdapterTile("fused", 32, 32, 8, 2),
        ("fp32", "few", "forward", 16): AdapterTile("fused", 16, 64, 4, 2),
        ("fp32", "few", "backward", 128): AdapterTile("fused", 16, 32, 8, 2),
        ("fp32", "few", "backward", 256): AdapterTile("fused", 16, 32, 8, 2),
        ("fp32", "ragged", "forward", 16): AdapterTile("fused", 32, 32, 4, 2),
        ("fp32", "ragged", "backward", 128): AdapterTile("fused", 16, 32, 4, 2),
    },
}

# The gradients of the parameters need registers for the scale, its gradient and the mask, so that
# LoRA's tiles of the reduction would spill.
_REDUCTION_TILES = {
    16: ReductionTile(32, 64, 16, 4, 3),
    32: ReductionTile(64, 64, 32, 4, 3),
    64: ReductionTile(64, 64, 64, 8, 2),
}
_REDUCTION_TILES_COMPACT = _REDUCTION_TILES | {
    32: ReductionTile(64, 32, 32, 8, 3),
    64: ReductionTile(64, 32, 64, 8, 2),
}
_REDUCTION_TILES_HOPPER = {
    16: ReductionTile(64, 64, 16, 4, 3, product_sums=True),
    32: ReductionTile(64, 64, 32, 8, 3, product_sums=True),
    64: ReductionTile(64, 64, 64, 4, 3, product_sums=True),
    128: ReductionTile(64, 128, 128, 8, 4, product_sums=True),
}
_REDUCTION_TILES_32BIT = {
    16: ReductionTile(32, 64, 16, 8, 2),
    32: ReductionTile(32, 64, 32, 4, 2),
    64: ReductionTile(32, 64, 32, 4, 2),
}
_REDUCTION_TILES_32BIT_COMPACT = _REDUCTION_TILES_32BIT | {
    32: ReductionTile(32, 32, 32, 8, 2),
    64: ReductionTile(32, 32, 32, 8, 2),
}
# Where D is no multiple of 16.
_REDUCTION_TILE_UNALIGNED = ReductionTile(32, 64, 32, 8, 2)
_REDUCTION_TILES_UNALIGNED = {
    "sm_100": ReductionTile(32, 32, 16, 4, 1),
    "sm_120": ReductionTile(32, 32, 32, 4, 2),
}

# The most tokens of "few".
FEW_TOKENS = 4096


def bottleneck_block(bottleneck: int) -> int:
    """Return the columns of the block that holds a bottleneck: a power of two of at least 16."""
    return max(16, 1 << (bottleneck - 1).bit_length())


def adapter_tile(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    bottleneck: int,
    direction: str,
) -> AdapterTile:
    """Return how one launch of an adapter runs.

    Args:
        device: where.
        dtype: float32, float16 or bfloat16.
        tokens: M.
        features: D.
        bottleneck: r.
        direction: "forward" or "backward".
    """
    if bottleneck > MAX_BOTTLENECK:
        return LIBRARY
    width = tiles.width(dtype)
    if device.type == "cuda" and width == "fp32" and tiles.precision(dtype, device) == "ieee":
        return LIBRARY
    family, block = tiles.table_of(device), bottleneck_block(bottleneck)
    few = overrides.entry(family, "limits", "few_tokens", "adapter", FEW_TOKENS)
    shape_class = "few" if tokens <= few else "many"
    if features % 16 or bottleneck % 16:
        shape_class = "ragged"
    tile = _INTERPRETED
    if device.type == "cuda":
        tile = family_tile(family, width, shape_class, direction, block)
    own = overrides.entry(family, "adapter", width, f"{shape_class} {direction} {block}", tile)
    return replace(own, ahead=tile.ahead)


def family_tile(name: str, width: str, shape_class: str, direction: str, block: int) -> AdapterTile:
    """Return a tile of a GPU family, by width ("16bit" or "fp32") and shape class."""
    table = _32BIT if width == "fp32" else _16BIT
    key = (width, shape_class, direction, block)
    own = _FAMILY_EXCEPTIONS.get(name, {})
    tile = own.get(key) or _EXCEPTIONS.get(key) or table[shape_class][block]
    return replace(tile, ahead=name == "sm_90")


def reduction_tiles(name: str, width: str) -> dict[int, ReductionTile]:
    """Return a family's tiles of the reduction by the ranks of a block."""
    if width == "fp32":
        compact = name in ("sm_86", "sm_89")
        return _REDUCTION_TILES_32BIT_COMPACT if compact else _REDUCTION_TILES_32BIT
    if name == "sm_90":
        return _REDUCTION_TILES_HOPPER
    compact = name in ("sm_86", "sm_89", "sm_120")
    return _REDUCTION_TILES_COMPACT if compact else _REDUCTION_TILES


def unaligned_reduction_tile(name: str) -> ReductionTile:
    """Return a family's tile of the reduction where D is no multiple of 16."""
    return _REDUCTION_TILES_UNALIGNED.get(name, _REDUCTION_TILE_UNALIGNED)


def reduction_tile(
    device: torch.device, dtype: torch.dtype, features: int, bottleneck: int
) -> ReductionTile:
    """Return the tile of the token-split reduction of the parameters' gradients."""
    if device.type != "cuda":
        return tiles.reduction_tile(device, dtype, bottleneck)
    if features % 16:
        return unaligned_reduction_tile(tiles.family(device))
    table = reduction_tiles(tiles.family(device), tiles.width(dtype))
    return tiles.overruled_reduction_tile(device, dtype, "adapter reduction", table, bottleneck)


def plan(
    device: torch.device, dtype: torch.dtype, tokens: int, features: int, bottleneck: int
) -> str:
    """Return how forward and backward of a call run, for ``explain``."""
    forward, backward = (
        adapter_tile(device, dtype, tokens, features, bottleneck, direction)
        for direction in DIRECTIONS
    )
    if forward.variant == "library":
        return str(forward)
    note = overrides.note(tiles.table_of(device), "adapter", "adapter reduction")
    return f"forward {forward}; backward {backward}{note}"


def adapter_cases(name: str, width: str) -> Iterator[tuple[str, str, int, AdapterTile]]:
    """Yield (shape class, direction, block, tile) of every launch of a family's tables.

    Args:
        name: the family.
        width: "16bit" or "fp32".
    """
    for shape_class, table in (_32BIT if width == "fp32" else _16BIT).items():
        for direction in DIRECTIONS:
            for block in table:
                tile = family_tile(name, width, shape_class, direction, block)
                yield shape_class, direction, block, tile
