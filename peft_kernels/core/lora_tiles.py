"""Tile table of LoRA: which kernel variant and block sizes run, per GPU family and shape class.

Data, not code. Every tile here cross-compiles without spills for its families
(``tests/compile``); which of them is fastest has been measured only where ``bench/results`` says
so, the rest is reasoned from the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from peft_kernels.core import tiles
from peft_kernels.core.forced import Forced

VARIANTS = ("ticket", "ticket_tma", "recompute", "split")


@dataclass(frozen=True)
class LoRATile:
    """How one launch of a LoRA product runs.

    Attributes:
        variant: "ticket" (producers of s and output tiles in one launch, ordered by an atomic
            ticket), "ticket_tma" (the same by TMA, on Hopper), "recompute" (every output tile
            computes its own s), or "split" (library GEMM, then s, then the rank-r update).
        block_m: rows (tokens) of a tile.
        block_n: columns of a tile.
        block_k: depth of one step of the main loop.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        group_m: row blocks that share a pass over the columns, for L2 reuse.
    """

    variant: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def __str__(self) -> str:
        """Return variant and sizes in short."""
        if self.variant == "split":
            return "split: library GEMM, then the low-rank update"
        return (
            f"{self.variant} {self.block_m}x{self.block_n}x{self.block_k}, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )


# Keyed by family, then by shape class: "decode" is at most 16 tokens, "small" at most 256, "large"
# the rest. A large forward under dropout is "dropped" where a table tells it from "large". A large
# backward is "backward", or "masked" under dropout, whose epilogue needs registers for the mask.
# "+" marks ranks above 16: their blocks of a, b and s need registers too.
_WIDE = {
    # 64 columns left half of an H200 without work at 4096 columns.
    "decode": LoRATile("recompute", 16, 32, 128, 4, 4),
    "decode+": LoRATile("recompute", 16, 32, 64, 4, 4),
    "small": LoRATile("ticket", 64, 64, 64, 4, 4),
    "small+": LoRATile("ticket", 64, 64, 64, 4, 4),
    "large": LoRATile("ticket", 128, 256, 64, 8, 4),
    "large+": LoRATile("ticket", 128, 128, 64, 8, 4),
    "backward": LoRATile("ticket", 128, 256, 64, 8, 3),
    "backward+": LoRATile("ticket", 128, 128, 64, 8, 4),
    "masked": LoRATile("ticket", 128, 128, 64, 8, 3),
    "masked+": LoRATile("ticket", 128, 128, 64, 8, 3),
}
_AMPERE = _WIDE | {
    "decode": LoRATile("recompute", 16, 64, 64, 4, 4),
    "large": LoRATile("ticket", 128, 128, 64, 8, 3),
    "large+": LoRATile("ticket", 128, 128, 32, 8, 4),
    "backward": LoRATile("ticket", 128, 128, 64, 8, 3),
    "backward+": LoRATile("ticket", 128, 128, 32, 8, 4),
    "masked": LoRATile("ticket", 128, 128, 32, 8, 4),
    "masked+": LoRATile("ticket", 128, 128, 32, 8, 4),
}
# 99 KiB of shared memory.
_COMPACT = _AMPERE | {
    "decode": LoRATile("recompute", 16, 64, 64, 4, 3),
    "decode+": LoRATile("recompute", 16, 64, 64, 4, 3),
    "large": LoRATile("ticket", 128, 128, 32, 8, 3),
    "large+": LoRATile("ticket", 128, 128, 32, 8, 3),
    "backward": LoRATile("ticket", 128, 128, 32, 8, 3),
    "backward+": LoRATile("ticket", 128, 128, 32, 8, 3),
    "masked": LoRATile("ticket", 128, 128, 32, 8, 3),
    "masked+": LoRATile("ticket", 128, 128, 32, 8, 3),
}
# Hopper's tiles by TMA, and the shape classes in which they are taken without being forced: there
# they beat every pointer tile on an H200, in 14 of 16 cases (the other two are masked, by 4%).
TMA_CLASSES = frozenset(
    name + suffix for name in ("large", "dropped", "backward", "masked") for suffix in ("", "+")
)
_TMA = {
    "small": LoRATile("ticket_tma", 64, 64, 64, 4, 4),
    "small+": LoRATile("ticket_tma", 64, 64, 64, 4, 4),
    "large": LoRATile("ticket_tma", 256, 128, 64, 8, 4),
    "large+": LoRATile("ticket_tma", 128, 256, 64, 8, 4),
    "dropped": LoRATile("ticket_tma", 128, 256, 64, 8, 4),
    "dropped+": LoRATile("ticket_tma", 128, 256, 64, 8, 4),
    "backward": LoRATile("ticket_tma", 256, 128, 64, 8, 4),
    "backward+": LoRATile("ticket_tma", 256, 128, 64, 8, 4),
    "masked": LoRATile("ticket_tma", 128, 256, 64, 8, 4),
    "masked+": LoRATile("ticket_tma", 128, 256, 64, 8, 4),
}
# Multiply-adds from which TMA is worth describing four tensors to it, half of a launch on the
# host: below, what it saves the device of an H200 (at most a tenth) is less. Reasoned from both.
TMA_WORK = 1 << 35
_BLACKWELL = _WIDE | {
    "large": LoRATile("ticket", 128, 256, 64, 8, 4),
    "backward": LoRATile("ticket", 128, 128, 64, 8, 4),
}
_LORA_16BIT: dict[str, dict[str, LoRATile]] = {
    "sm_80": _AMPERE,
    "sm_86": _COMPACT,
    "sm_89": _COMPACT,
    "sm_90": _WIDE,
    "sm_100": _BLACKWELL,
    "sm_120": _COMPACT,
}
# float32 with tf32 products. Exact float32 products belong to the GEMM library ("split").
_LORA_TF32 = {
    "decode": LoRATile("recompute", 16, 64, 64, 4, 3),
    "decode+": LoRATile("recompute", 16, 64, 32, 4, 3),
    "small": LoRATile("ticket", 64, 64, 32, 4, 3),
    "small+": LoRATile("ticket", 64, 64, 32, 4, 3),
    "large": LoRATile("ticket", 128, 64, 32, 8, 3),
    "large+": LoRATile("ticket", 128, 64, 32, 8, 3),
    "backward": LoRATile("ticket", 128, 64, 32, 8, 3),
    "backward+": LoRATile("ticket", 128, 64, 32, 8, 3),
    "masked": LoRATile("ticket", 64, 64, 32, 4, 3),
    "masked+": LoRATile("ticket", 64, 64, 32, 4, 3),
}
# Where K is no multiple of 64, or N, a stride or an address none of 16: loads are masked or cannot
# be asynchronous copies, pass through registers, and leave fewer of them for the tile.
_UNALIGNED = LoRATile("ticket", 64, 64, 64, 8, 2)
_UNALIGNED_TF32 = LoRATile("ticket", 64, 32, 32, 4, 2)
# What computes s alone, for "split" and for a backward that needs no dx.
LOW_RANK_TILE = LoRATile("split", 64, 64, 64, 4, 3)
LOW_RANK_TILE_32BIT = LoRATile("split", 64, 64, 32, 4, 3)
# Exact float32 products run off the tensor cores and need more registers.
LOW_RANK_TILE_EXACT = LoRATile("split", 32, 64, 32, 4, 2)
_INTERPRETED = LoRATile("ticket", 32, 32, 32, 4, 1)

# "ticket" serves where another cannot run: "recompute" for ranks above 32 and for dropout in
# backward, "ticket_tma" off Hopper, for float32, unaligned operands and ranks off 8.
FORCED = Forced(*VARIANTS)
forced_variant = FORCED.variant


def _table(device: torch.device, dtype: torch.dtype) -> dict[str, LoRATile]:
    if device.type != "cuda":
        return dict.fromkeys(_WIDE, _INTERPRETED)
    return _LORA_TF32 if dtype == torch.float32 else _LORA_16BIT[tiles.family(device)]


def _tma_tile(
    device: torch.device, dtype: torch.dtype, rank: int, name: str, aligned: bool
) -> LoRATile | None:
    """Return the tile of "ticket_tma" where that is forced, or measured the fastest, and runs."""
    if FORCED.current != "ticket_tma" and (FORCED.current or name not in TMA_CLASSES):
        return None
    if device.type != "cuda":
        return replace(_INTERPRETED, variant="ticket_tma") if FORCED.current else None
    # Loaded one by one, the elements of b at another rank need the registers of a wide tile.
    if not aligned or rank % 8 or dtype == torch.float32 or tiles.family(device) != "sm_90":
        return None
    return _TMA[name.replace("decode", "small")]


def tma_pays(tokens: int, in_features: int, out_features: int) -> bool:
    """Return whether TMA gains a product more than it costs the host, or is forced."""
    return FORCED.current == "ticket_tma" or tokens * in_features * out_features >= TMA_WORK


def rank_block(rank: int) -> int:
    """Return how many ranks a product takes at a time; wider blocks spill beside a large tile."""
    return 16 if rank <= 16 else 32


def store_slices(tile: LoRATile, masked: bool) -> int:
    """Return in how many column slices "ticket_tma" stores a tile.

    A masked slice also holds its low-rank product and the mask in registers.
    """
    return 2 if not masked else 4 if tile.block_n <= 128 else 8


def low_rank_stages(tile: LoRATile) -> int:
    """Return how deep "ticket_tma" prefetches for s: as deep as the memory of the main loop holds.

    A step takes low_rank_rows of x and at most 32 of a, one of the main loop block_m and block_n.
    """
    fitting = tile.num_stages * (tile.block_m + tile.block_n) // (low_rank_rows(tile) + 32)
    return min(2 * tile.num_stages, fitting)


def low_rank_rows(tile: LoRATile) -> int:
    """Return how many rows of s a program of "ticket_tma" makes at a time.

    Fewer than a tile has, so that this work, long under dropout, spreads over all programs.
    """
    return max(16, min(64, tile.block_m // 2))


def lora_tile(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    rank: int,
    direction: str,
    aligned: bool = True,
    tma: bool = True,
) -> LoRATile:
    """Return how a LoRA product runs.

    Args:
        device: where.
        dtype: float32, float16 or bfloat16.
        tokens: M.
        rank: r.
        direction: "forward" or "backward", under dropout "dropped" or "masked".
        aligned: whether sizes, strides and addresses of x and w allow unmasked asynchronous copies.
        tma: whether tensor descriptors may name x, w and y, and pay.
    """
    table = _table(device, dtype)
    shape_class = "decode" if tokens <= 16 else "small" if tokens <= 256 else "large"
    # The decode tile recomputes s, which a masked epilogue cannot.
    if direction == "masked" and shape_class == "decode":
        shape_class = "small"
    if direction != "forward" and shape_class == "large":
        shape_class = direction
    name = shape_class + ("+" if rank > 16 else "")
    by_tma = _tma_tile(device, dtype, rank, name, aligned) if tma else None
    if by_tma is not None:
        return by_tma
    tile = table[name.replace("dropped", "large")]
    if not aligned and device.type == "cuda":
        tile = _UNALIGNED_TF32 if dtype == torch.float32 else _UNALIGNED
    exact = (
        dtype == torch.float32
        and device.type == "cuda"
        and tiles.precision(dtype, device) == "ieee"
    )
    variant = FORCED.current or ("split" if exact else tile.variant)
    if variant == "recompute" and (rank > 32 or direction == "masked"):
        variant = "ticket"
    if variant == "ticket_tma":
        variant = "ticket"
    if variant == "ticket" and tile.variant == "recompute":
        tile = table["small" + ("+" if rank > 16 else "")]
    return tile if variant == tile.variant else replace(tile, variant=variant)


def low_rank_tile(device: torch.device, dtype: torch.dtype) -> LoRATile:
    """Return the tile of the launch that computes s alone."""
    if device.type != "cuda":
        return _INTERPRETED
    if dtype != torch.float32:
        return LOW_RANK_TILE
    return LOW_RANK_TILE_32BIT if tiles.precision(dtype, device) == "tf32" else LOW_RANK_TILE_EXACT


def lora_plan(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dropout: bool,
) -> str:
    """Return how forward and backward of a LoRA call run, for ``explain``."""
    there, back = ("dropped", "masked") if dropout else ("forward", "backward")
    even = in_features % 64 == out_features % 16 == 0
    tma = tma_pays(tokens, in_features, out_features)
    forward = lora_tile(device, dtype, tokens, rank, there, even, tma)
    even = out_features % 64 == in_features % 16 == 0
    backward = lora_tile(device, dtype, tokens, rank, back, even, tma)
    return f"forward {forward}; backward {backward}"


def lora_cases() -> Iterator[tuple[str, str, str, LoRATile]]:
    """Yield (family, dtype, shape class, tile) of every LoRA launch the tables can choose."""
    for name in tiles.FAMILIES:
        for shape_class, tile in _LORA_16BIT[name].items():
            for dtype in ("bf16", "fp16"):
                yield name, dtype, shape_class, tile
        for shape_class, tile in _TMA.items() if name == "sm_90" else ():
            for dtype in ("bf16", "fp16"):
                yield name, dtype, shape_class, tile
        for suffix in ("", "+"):
            yield name, "bf16", "unaligned" + suffix, _UNALIGNED
            yield name, "fp16", "unaligned" + suffix, _UNALIGNED
            yield name, "fp32", "unaligned" + suffix, _UNALIGNED_TF32
        for shape_class, tile in _LORA_TF32.items():
            yield name, "fp32", shape_class, tile
