"""Tile tables of LoRA: which kernel variant and block sizes run, per GPU family and shape class.

Data, not code. Every tile here cross-compiles without spills for its families
(``tests/compile``); which of them is fastest has been measured only where ``bench/results`` says
so, the rest is reasoned from the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

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


# The most tokens of each shape class, by direction; None: any number. A forward is "dropped" under
# dropout, a backward "masked": its epilogue needs registers for the mask, and the decode tile
# recomputes s, which a masked epilogue cannot.
SHAPE_CLASSES: dict[str, tuple[tuple[int | None, str], ...]] = {
    "forward": ((16, "decode"), (256, "small"), (None, "large")),
    "dropped": ((16, "decode"), (256, "small"), (None, "dropped")),
    "backward": ((16, "decode"), (256, "small"), (None, "backward")),
    "masked": ((256, "small"), (None, "masked")),
}
# "+" marks ranks above this: their blocks of a, b and s need registers too.
FEW_RANKS = 16
# A dropped forward takes the tile of "large" where a table has none of its own for it.
SAME_AS = {"dropped": "large", "dropped+": "large+"}

# Keyed by family, then by shape class.
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
# Hopper's tiles by TMA.
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
TMA: dict[str, dict[str, LoRATile]] = {"sm_90": _TMA}
# Multiply-adds from which a product takes its tile by TMA without being forced; None: never. On an
# H200 those tiles beat every pointer tile in 14 of 16 cases (the other two are masked, by 4%), but
# describing four tensors costs the host half of a launch: with less to do, what the device saves,
# at most a tenth, is less; reasoned from both. Under dropout it saves more: of 2048 x 3584 x 3584
# at rank 16 forward took 0.106 ms and both 0.246 by TMA, 0.149 and 0.311 without.
_TMA_FROM = {
    "small": None, "large": 1 << 35, "dropped": 1 << 34, "backward": 1 << 35, "masked": 1 << 34,
}  # fmt: skip
TMA_FROM: dict[str, dict[str, int | None]] = {
    "sm_90": {name: _TMA_FROM[name.removesuffix("+")] for name in _TMA}
}
_BLACKWELL = _WIDE | {
    "large": LoRATile("ticket", 128, 256, 64, 8, 4),
    "backward": LoRATile("ticket", 128, 128, 64, 8, 4),
}
LORA_16BIT: dict[str, dict[str, LoRATile]] = {
    "sm_80": _AMPERE,
    "sm_86": _COMPACT,
    "sm_89": _COMPACT,
    "sm_90": _WIDE,
    "sm_100": _BLACKWELL,
    "sm_120": _COMPACT,
}
# float32 with tf32 products.
LORA_TF32 = {
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
# Exact float32 products belong to the GEMM library.
EXACT_VARIANT = "split"
# Where K is no multiple of 64, or N, a stride or an address none of 16: loads are masked or cannot
# be asynchronous copies, pass through registers, and leave fewer of them for the tile.
UNALIGNED = LoRATile("ticket", 64, 64, 64, 8, 2)
UNALIGNED_TF32 = LoRATile("ticket", 64, 32, 32, 4, 2)
# What computes s alone, for "split" and for a backward that needs no dx.
LOW_RANK_TILE = LoRATile("split", 64, 64, 64, 4, 3)
LOW_RANK_TILE_32BIT = LoRATile("split", 64, 64, 32, 4, 3)
# Exact float32 products run off the tensor cores and need more registers.
LOW_RANK_TILE_EXACT = LoRATile("split", 32, 64, 32, 4, 2)
INTERPRETED = LoRATile("ticket", 32, 32, 32, 4, 1)
