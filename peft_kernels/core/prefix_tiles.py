"""Tile table of prefix attention, per GPU family and shape class."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrefixTile:
    """Block sizes of one launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages"


_INTERPRETED = PrefixTile(16, 16, 4, 1)


def head_block(head_size: int) -> int:
    """Return the columns of the block that holds a head: a power of two of at least 16."""
    return max(16, 1 << (head_size - 1).bit_length())


def prefix_tile(device: torch.device, dtype: torch.dtype, head_size: int, launch: str, dropout: bool) -> PrefixTile:
    return _INTERPRETED


def prefix_block(prefix: int, tile: PrefixTile) -> int:
    return 0 if prefix == 0 else min(tile.block_n, max(16, 1 << (prefix - 1).bit_length()))


GATE_BLOCK = 1024


def why_not(head_size):
    return None


def plan(*a):
    return ""
