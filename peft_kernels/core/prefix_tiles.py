"""Tile table of prefix attention, per GPU family and shape class.

Data, not code. Every tile here cross-compiles without spills for its families
(``tests/compile``). Those of sm_90 for 16-bit heads of 64 and 128 without dropout are the fastest
of some ten candidates each on an H200; the rest is reasoned from the sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from peft_kernels.core import overrides, tiles
from peft_kernels.core.forced import Forced

LAUNCHES = ("forward", "query", "key", "prefix")
# A program holds whole heads in its registers.
MAX_HEAD_SIZE = 256
# Two operands of wider heads in float32 leave no registers for their product.
_WIDEST_32BIT = 128
# Rows of one step of the gate's gradient.
GATE_BLOCK = 1024


@dataclass(frozen=True)
class PrefixTile:
    """How one launch of prefix attention runs.

    Attributes:
        block_m: query rows of a tile.
        block_n: keys of a tile.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        tma: what a loop streams is read by tensor descriptors: keys and values in forward and for
            dq, queries and dout for the other gradients.
        registers: the most that a thread may take in a launch without masks, 0 for no such bound:
            fewer let one more program run beside it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    registers: int = 0

    def __str__(self) -> str:
        """Return the sizes in short."""
        if self == LIBRARY:
            return "library: exact float32, and wide heads of float32, as whole matrices of scores"
        by = " by TMA" if self.tma else ""
        bound = f", {self.registers} registers" if self.registers else ""
        sizes = f"{self.block_m}x{self.block_n}{by}, {self.num_warps} warps"
        return f"{sizes}, {self.num_stages} stages{bound}"


LIBRARY = PrefixTile(0, 0, 0, 0)
_INTERPRETED = PrefixTile(16, 16, 4, 1)

# One line for each launch: rows x keys x warps x stages for heads of at most 64, 128 and (in 16
# bits) 256, each without and with dropout, whose mask takes registers. "key" is the launch of dk
# and dv, "query" that of dq. A tile serves a launch with all of its features at once, gated or not:
# a gate of zero then changes no bit.
_TABLES: dict[str, dict[str, dict[str, str]]] = {
    "16bit": {
        "sm_80": {
            "forward": "128x64x8x3 128x32x8x2  64x32x4x2 64x32x4x2  64x32x8x2 64x32x8x2",
            "query": "128x32x8x2 64x32x4x2  64x32x8x2 32x32x8x2  16x32x4x2/200 32x32x8x2",
            "key": "32x128x8x2 32x32x4x2  32x64x8x2 32x64x8x2  32x32x8x2 32x32x8x2",
            "prefix": "64x128x8x2 32x128x8x2  64x64x8x2 32x64x8x2  32x32x8x2 32x32x8x2",
        },
        "sm_86": {
            "forward": "128x64x8x3 128x32x8x2  64x32x4x2 64x32x4x2  64x32x8x2 64x32x8x2",
            "query": "128x32x8x2 64x32x4x2  64x32x8x2 64x32x8x2  32x32x8x2 32x32x8x2",
            "key": "32x128x8x2 32x32x4x2  32x64x8x2 32x64x8x2  32x32x8x2 32x32x8x2",
            "prefix": "64x128x8x2 32x128x8x2  64x64x8x2 32x64x8x2  32x32x8x2 32x32x8x2",
        },
        "sm_90": {
            "forward": "64x64x4x3 128x64x8x3  64x64x4x3 128x64x8x3  128x32x8x2 64x32x8x2",
            "query": "64x64x4x3 64x64x4x2  64x32x4x3 128x32x8x2  16x32x4x2 16x32x4x2",
            "key": "64x64x4x2 64x64x4x2  64x64x4x2 32x128x8x2  32x32x8x2 32x32x8x2",
            "prefix": "64x64x4x2 64x64x4x2  64x64x4x2 64x64x8x2  32x64x8x2 32x32x8x2",
        },
        "sm_100": {
            "forward": "128x64x8x2 128x64x8x3  128x64x8x3 128x64x8x2  64x32x8x2 64x32x8x2",
            "query": "128x64x8x2 128x64x8x2  64x64x8x2 128x32x8x2  32x32x8x2 32x32x8x2",
            "key": "64x128x8x2 64x128x8x2  32x128x8x2 32x128x8x2  32x64x8x2 32x64x8x2",
            "prefix": "64x128x8x2 64x128x8x2  64x64x8x2 32x128x8x2  32x32x8x2 32x32x8x2",
        },
        "sm_120": {
            "forward": "128x64x8x2 128x32x8x2  64x32x4x2 64x32x4x2  64x32x8x2 64x32x8x2",
            "query": "128x32x8x2 128x32x8x2  64x32x8x2 64x32x8x2  32x32x8x2 32x32x8x2",
            "key": "32x128x8x2 32x32x4x2  32x64x8x2 32x32x8x2  32x32x8x2 32x32x8x2",
            "prefix": "64x128x8x2 32x32x8x2  64x64x8x2 32x64x8x2  32x32x8x2 32x32x8x2",
        },
    },
    "fp32": {
        "sm_80": {
            "forward": "128x64x8x3 128x32x8x2  32x32x4x2 16x16x4x2",
            "query": "64x32x8x2 32x32x8x2  32x32x8x2 16x32x4x2",
            "key": "32x32x4x2 32x32x4x2  32x32x8x2 32x32x8x2",
            "prefix": "32x128x8x2 32x32x8x2  64x64x8x2 16x32x4x2",
        },
        "sm_86": {
            "forward": "128x64x8x3 128x32x8x2  32x32x4x2 16x16x4x2",
            "query": "32x32x8x2 32x32x8x2  16x32x4x2 32x32x8x2",
            "key": "32x32x4x2 32x32x4x2  32x32x8x2 32x32x8x2",
            "prefix": "32x64x8x2 32x32x8x2  32x32x8x2 32x32x8x2",
        },
        "sm_90": {
            "forward": "128x64x8x3 128x64x8x3  64x16x4x2 128x32x8x2",
            "query": "128x64x8x2 128x32x8x2  32x32x8x2 16x32x4x2",
            "key": "64x128x8x2 32x128x8x2  32x32x8x2 32x32x8x2",
            "prefix": "64x128x8x2 32x128x8x2  32x32x8x2 32x32x8x2",
        },
        "sm_100": {
            "forward": "128x64x8x2 128x64x8x3  128x32x8x2 64x32x8x2",
            "query": "128x64x8x2 64x64x8x2  16x16x4x2 16x32x4x2",
            "key": "64x128x8x2 32x128x8x2  32x64x8x2 32x64x8x2",
            "prefix": "64x128x8x2 64x128x8x2  32x64x8x2 32x64x8x2",
        },
        "sm_120": {
            "forward": "128x32x8x2 128x32x8x2  16x32x4x2 32x32x4x2",
            "query": "32x32x4x2 32x32x4x2  16x16x8x2 32x32x8x2",
            "key": "32x32x4x2 32x32x4x2  32x32x8x2 32x32x8x2",
            "prefix": "32x128x8x2 32x128x8x2  32x32x8x2 32x32x8x2",
        },
    },
}
# Tiles by TMA, for heads of at most 64 and 128 in 16 bits without dropout, and the most registers
# where it is bound; those of _TABLES serve what descriptors cannot name, and everything else. On an
# H200 they took 0.72 to 0.96 of the time of the best tiles without, which give the same bits.
_BY_TMA = {
    "sm_90": {
        "forward": "64x64x4x2/128 64x64x4x3",
        "query": "64x64x4x2/128 64x64x4x2",
        "key": "64x64x4x2/168 64x64x4x2",
        "prefix": "64x64x4x3 64x64x4x2",
    },
}
# The least number of queries from which "split" is faster than our kernel over both ranges: the
# prefix by our kernel, the sequence by SDPA's flash kernel. None: it never is ("cpu": 2.5 to 9
# times slower with 128 to 2048 queries), or nobody has measured it (GPU families).
SPLIT_FROM: dict[str, int | None] = dict.fromkeys(("cpu", *tiles.FAMILIES))
SPLIT_LEAST_KEYS = 128
# "pointers" is "fused" where no launch takes descriptors, "tma" where all do that can.
VARIANTS = ("fused", "pointers", "tma", "split")

# Families that take the tiles of another where they have none of their own.
_LIKE = {"sm_86": "sm_80", "sm_89": "sm_80"}
_BLOCKS = (64, 128, 256)

FORCED = Forced(*VARIANTS)
forced_variant = FORCED.variant


def variant(device: torch.device, queries: int) -> str:
    """Return "fused" or "split", which wins for so many queries where both can serve."""
    if FORCED.current is not None:
        return "split" if FORCED.current == "split" else "fused"
    name = "cpu" if device.type == "cpu" else tiles.family(device)
    least, state = SPLIT_FROM[name], overrides.STATE
    # Every call comes by here: where nothing overrules, without another call.
    if state.forced is not None or state.file is None or state.file.entries:
        least = overrides.entry(name, "limits", "split_from", "queries", least)
    return "fused" if least is None or queries < least else "split"


@functools.cache
def _parsed(table: str, name: str, launch: str) -> tuple[PrefixTile, ...]:
    by_family = _TABLES[table]
    home = name if name in by_family else _LIKE[name]
    return tuple(map(_tile, by_family[home][launch].split()))


def _tile(text: str, *, tma: bool = False) -> PrefixTile:
    """Return the tile of "64x64x4x2", or with its bound of registers of "64x64x4x2/168"."""
    sizes, _, registers = text.partition("/")
    block_m, block_n, num_warps, num_stages = map(int, sizes.split("x"))
    return PrefixTile(block_m, block_n, num_warps, num_stages, tma, int(registers or 0))


@functools.cache
def tma_tile(name: str, launch: str, block: int) -> PrefixTile | None:
    """Return the tile by TMA of a GPU family and a launch, or None; ``block``: of the head."""
    column = next(i for i, widest in enumerate(_BLOCKS) if block <= widest)
    tiles_of_launch = _BY_TMA.get(name, {}).get(launch, "").split()
    if column >= len(tiles_of_launch):
        return None
    return _tile(tiles_of_launch[column], tma=True)


def family_tile(table: str, name: str, launch: str, block: int, dropout: bool) -> PrefixTile:
    """Return a tile of a GPU family.

    Args:
        table: "16bit" or "fp32" (tf32 products).
        name: the family.
        launch: one of ``LAUNCHES``.
        block: columns of the block that holds a head.
        dropout: whether the mask is drawn.
    """
    column = next(i for i, widest in enumerate(_BLOCKS) if block <= widest)
    return _parsed(table, name, launch)[2 * column + int(dropout)]


def head_block(head_size: int) -> int:
    """Return the columns of the block that holds a head: a power of two of at least 16."""
    return max(16, 1 << (head_size - 1).bit_length())


def prefix_block(prefix: int, tile: PrefixTile) -> int:
    """Return how many prefix keys are taken at a time: no more than there are, 0 of none."""
    return 0 if prefix == 0 else min(tile.block_n, head_block(prefix))


def prefix_tile(
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    launch: str,
    dropout: bool,
    tma: bool = True,
) -> PrefixTile:
    """Return how one launch of prefix attention runs; some float32 products are the library's.

    Args:
        device: where.
        dtype: float32, float16 or bfloat16.
        head_size: d.
        launch: one of ``LAUNCHES``.
        dropout: whether there is dropout.
        tma: whether descriptors can name what the launch streams.
    """
    if device.type != "cuda":
        tile = _overruled(tiles.INTERPRETED, dtype, head_size, launch, dropout, _INTERPRETED)
        return replace(tile, tma=tma and FORCED.current == "tma")
    table = "fp32" if dtype == torch.float32 else "16bit"
    if table == "fp32" and tiles.precision(dtype, device) == "ieee":
        return LIBRARY
    if table == "fp32" and head_size > _WIDEST_32BIT:
        return LIBRARY
    name, block = tiles.family(device), head_block(head_size)
    if tma and not dropout and table == "16bit" and FORCED.current != "pointers":
        by_tma = tma_entry(name, launch, head_size)
        if by_tma is not None:
            return by_tma
    tile = family_tile(table, name, launch, block, dropout)
    return _overruled(name, dtype, head_size, launch, dropout, tile)


def entry_name(launch: str, head_size: int, dropout: bool) -> str:
    """Return what a file of tiles calls the tile of a launch: "key 128", "key 128 dropout"."""
    widest = next(widest for widest in _BLOCKS if head_size <= widest)
    return f"{launch} {widest}" + " dropout" * dropout


def tma_entry(name: str, launch: str, head_size: int) -> PrefixTile | None:
    """Return the tile by TMA of a family and a launch, or what overrules it; None: there is none.

    A file of tiles calls it "tma key 128".
    """
    tile = tma_tile(name, launch, head_block(head_size))
    entry = "tma " + entry_name(launch, head_size, False)
    own: PrefixTile | None = overrides.entry(name, "prefix", "16bit", entry, tile)
    return own


def _overruled(
    name: str, dtype: torch.dtype, head_size: int, launch: str, dropout: bool, tile: PrefixTile
) -> PrefixTile:
    entry = entry_name(launch, head_size, dropout)
    own: PrefixTile = overrides.entry(name, "prefix", tiles.width(dtype), entry, tile)
    return own


def why_not(head_size: int) -> str | None:
    """Return the reason against these kernels for a head size, or None."""
    if head_size > MAX_HEAD_SIZE:
        return f"a program holds heads of at most {MAX_HEAD_SIZE} features: use more, smaller heads"
    return None


def plan(device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    """Return how a call runs whose tensors descriptors can name, for ``explain``."""
    found = [prefix_tile(device, dtype, head_size, launch, dropout) for launch in LAUNCHES]
    if LIBRARY in found:
        return str(LIBRARY)
    note = overrides.note(tiles.table_of(device), "prefix")
    return "forward {}; dq {}; dk and dv {}; prefix {}".format(*found) + note


def prefix_cases(name: str, table: str) -> Iterator[tuple[str, int, bool, PrefixTile]]:
    """Yield (launch, block, dropout, tile) of every launch of a family's tables."""
    widest = _WIDEST_32BIT if table == "fp32" else MAX_HEAD_SIZE
    for launch in LAUNCHES:
        for block in (block for block in _BLOCKS if block <= widest):
            for dropout in (False, True):
                yield launch, block, dropout, family_tile(table, name, launch, block, dropout)
    for launch, line in _BY_TMA.get(name, {}).items() if table == "16bit" else ():
        for block, text in zip(_BLOCKS, line.split(), strict=False):
            yield launch, block, False, _tile(text, tma=True)
