"""Which tile of ``lora_tables`` a LoRA launch takes, by device, shape and what is forced."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from peft_kernels.core import overrides, tiles
from peft_kernels.core.forced import Forced
from peft_kernels.core.lora_tables import (
    EXACT_VARIANT,
    FEW_RANKS,
    INTERPRETED,
    LORA_16BIT,
    LORA_TF32,
    LOW_RANK_TILE,
    LOW_RANK_TILE_32BIT,
    LOW_RANK_TILE_EXACT,
    SAME_AS,
    SHAPE_CLASSES,
    TMA,
    TMA_FROM,
    UNALIGNED,
    UNALIGNED_TF32,
    VARIANTS,
    LoRATile,
)

# "ticket" serves where another cannot run: "recompute" for ranks above 32 and for dropout in
# backward, "ticket_tma" off Hopper, for float32, unaligned operands and ranks off 8.
FORCED = Forced(*VARIANTS)
forced_variant = FORCED.variant


def table_tile(family: str, width: str, name: str) -> LoRATile:
    """Return what a family's table, or what overrules it, says of a shape class.

    Args:
        family: of GPUs, or "interpreted".
        width: "16bit" or "fp32" (tf32 products).
        name: the shape class; "tma " before it: of the tiles by TMA.
    """
    if name.startswith("tma "):
        tile = replace(INTERPRETED, variant="ticket_tma")
        if family != tiles.INTERPRETED:
            tile = TMA[family][name.removeprefix("tma ")]
    elif family == tiles.INTERPRETED:
        tile = INTERPRETED
    else:
        table = LORA_TF32 if width == "fp32" else LORA_16BIT[family]
        tile = table[name] if name in table else table[SAME_AS[name]]
    own: LoRATile = overrides.entry(family, "lora", width, name, tile)
    return replace(tile, variant="split") if own.variant == "split" else own


def tma_from(family: str, name: str) -> int | None:
    """Return the multiply-adds from which a shape class goes by TMA; None: it never does."""
    otherwise = TMA_FROM.get(family, {}).get(name)
    least: int | None = overrides.entry(family, "limits", "tma_from", name, otherwise)
    return least


def _tma_tile(
    family: str, width: str, rank: int, name: str, aligned: bool, work: float
) -> LoRATile | None:
    """Return the tile of "ticket_tma" where that is forced, or the table's choice, and runs."""
    if FORCED.current not in (None, "ticket_tma"):
        return None
    # Loaded one by one, the elements of b at another rank need the registers of a wide tile.
    runs = aligned and rank % 8 == 0 and width == "16bit" and family in TMA
    if FORCED.current is None:
        least = tma_from(family, name) if runs else None
        if least is None or work < least:
            return None
    elif not runs and family != tiles.INTERPRETED:
        return None
    return table_tile(family, width, "tma " + name.replace("decode", "small"))


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


def shape_class(tokens: int, rank: int, direction: str) -> str:
    """Return the name that a product has in the tables; its arguments are ``lora_tile``'s."""
    classes = SHAPE_CLASSES[direction]
    name = next(name for most, name in classes if most is None or tokens <= most)
    return name if rank <= FEW_RANKS else name + "+"


def lora_tile(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    rank: int,
    direction: str,
    aligned: bool = True,
    tma: bool = True,
    work: float = math.inf,
) -> LoRATile:
    """Return how a LoRA product runs.

    Args:
        device: where.
        dtype: float32, float16 or bfloat16.
        tokens: M.
        rank: r.
        direction: "forward" or "backward", under dropout "dropped" or "masked".
        aligned: whether sizes, strides and addresses of x and w allow unmasked asynchronous copies.
        tma: whether tensor descriptors may name x, w and y.
        work: multiply-adds of the base product.
    """
    exact = tiles.precision(dtype, device) == "ieee" and device.type == "cuda"
    family, width = tiles.table_of(device), tiles.width(dtype)
    return chosen(family, width, tokens, rank, direction, aligned, tma, work, exact)


def chosen(
    family: str,
    width: str,
    tokens: int,
    rank: int,
    direction: str,
    aligned: bool = True,
    tma: bool = True,
    work: float = math.inf,
    exact: bool = False,
) -> LoRATile:
    """Return what ``lora_tile`` does, of a family ("interpreted": on a CPU) and a width.

    ``exact``: float32 products are.
    """
    name = shape_class(tokens, rank, direction)
    by_tma = _tma_tile(family, width, rank, name, aligned, work) if tma else None
    if by_tma is not None:
        return by_tma
    tile = table_tile(family, width, name)
    if not aligned and family != tiles.INTERPRETED:
        tile = UNALIGNED_TF32 if width == "fp32" else UNALIGNED
    library = exact and width == "fp32"
    variant = FORCED.current or (EXACT_VARIANT if library else tile.variant)
    if variant == "ticket_tma" or not _recomputes(variant, rank, direction):
        variant = "ticket"
    if variant == "ticket" and tile.variant == "recompute":
        tile = table_tile(family, width, "small" if rank <= FEW_RANKS else "small+")
    return tile if variant == tile.variant else replace(tile, variant=variant)


def _recomputes(variant: str, rank: int, direction: str) -> bool:
    """Return whether a kernel of that variant could run: "recompute" holds one block of ranks."""
    return variant != "recompute" or (rank <= rank_block(rank) and direction != "masked")


def low_rank_tile(device: torch.device, dtype: torch.dtype) -> LoRATile:
    """Return the tile of the launch that computes s alone."""
    if device.type != "cuda":
        return INTERPRETED
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
    work = tokens * in_features * out_features
    forward = lora_tile(device, dtype, tokens, rank, there, even, work=work)
    even = out_features % 64 == in_features % 16 == 0
    backward = lora_tile(device, dtype, tokens, rank, back, even, work=work)
    note = overrides.note(tiles.table_of(device), "lora", "reduction")
    return f"forward {forward}; backward {backward}{note}"


def lora_cases() -> Iterator[tuple[str, str, str, LoRATile]]:
    """Yield (family, dtype, shape class, tile) of every LoRA launch the tables can choose."""
    for name in tiles.FAMILIES:
        for each, tile in LORA_16BIT[name].items():
            for dtype in ("bf16", "fp16"):
                yield name, dtype, each, tile
        for each, tile in TMA.get(name, {}).items():
            for dtype in ("bf16", "fp16"):
                yield name, dtype, each, tile
        for suffix in ("", "+"):
            yield name, "bf16", "unaligned" + suffix, UNALIGNED
            yield name, "fp16", "unaligned" + suffix, UNALIGNED
            yield name, "fp32", "unaligned" + suffix, UNALIGNED_TF32
        for each, tile in LORA_TF32.items():
            yield name, "fp32", each, tile
