"""GPU families, the precision of products, and tiles of the reduction and of prompt tuning.

Data, not code. Every tile here cross-compiles without spills for its families
(``tests/compile``); which of them is fastest has been measured only where ``bench/results`` says
so, the rest is reasoned from the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from peft_kernels.core import overrides, triton_runtime

FAMILIES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# What stands for a family where Triton interprets kernels, on CPU tensors.
INTERPRETED = "interpreted"
# Shared memory that one program may have, KiB.
SHARED_LIMIT_KIB = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
}  # fmt: skip


@dataclass(frozen=True)
class ReductionTile:
    """Block sizes of the token-split gradient reduction: tokens, columns, ranks.

    Each block of ranks reads x and dY once more, from L2 where it fits. Sums of 16-bit columns can
    be products with ones, where tensor cores read their operands from shared memory: no register
    then holds what is summed.
    """

    block_m: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int
    product_sums: bool = False


@dataclass(frozen=True)
class CopyTile:
    """Block sizes of the prompt kernels: rows, columns, tokens of one step of bookkeeping."""

    block_t: int
    block_d: int
    block_s: int
    num_warps: int


# By the ranks of a block: 16, 32, and what ranks above 32 take; where there are tiles of 128, ranks
# above 64 take those if they are multiples of 16: others need the registers for masks.
REDUCTION_TILES = {
    16: ReductionTile(64, 64, 16, 8, 3),
    32: ReductionTile(64, 64, 32, 8, 3),
    64: ReductionTile(64, 64, 64, 8, 2),
}
# The fastest of eleven candidates on an H200, with and without dropout.
_REDUCTION_TILES_BY_FAMILY = {
    "sm_90": {
        16: ReductionTile(128, 64, 16, 8, 4, product_sums=True),
        32: ReductionTile(64, 64, 32, 8, 3, product_sums=True),
        64: ReductionTile(64, 128, 64, 8, 3, product_sums=True),
        128: ReductionTile(64, 128, 128, 8, 4, product_sums=True),
    }
}
# A block of 64 ranks in float32 spills on some families.
REDUCTION_TILES_32BIT = {
    16: ReductionTile(32, 64, 16, 4, 2),
    32: ReductionTile(32, 64, 32, 8, 2),
    64: ReductionTile(32, 64, 32, 8, 2),
}
REDUCTION_TILES_EXACT = {
    16: ReductionTile(16, 64, 16, 8, 2),
    32: ReductionTile(16, 32, 32, 4, 2),
    64: ReductionTile(16, 32, 32, 4, 2),
}
_REDUCTION_TILES_INTERPRETED = {
    16: ReductionTile(32, 32, 16, 4, 1),
    32: ReductionTile(32, 32, 32, 4, 1),
    64: ReductionTile(32, 32, 32, 4, 1),
}

# By bytes of an element: a thread moves 16 bytes at a time. Gradients keep sixteen rows in flight.
PROMPT_TILES = {2: CopyTile(16, 256, 1024, 4), 4: CopyTile(16, 128, 1024, 4)}
PROMPT_GRADIENT_TILES = {2: CopyTile(2, 256, 1024, 2), 4: CopyTile(2, 128, 1024, 2)}


def family(device: torch.device) -> str:
    """Return the family of a CUDA device, the newest known one that it can run."""
    major, minor = triton_runtime.capability(device.index or 0)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89" if minor == 9 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def table_of(device: torch.device) -> str:
    """Return the family of a CUDA device, or "interpreted"."""
    return family(device) if device.type == "cuda" else INTERPRETED


def wgmma(device: torch.device) -> bool:
    """Return whether products on ``device`` are those of warp groups, which run asynchronously."""
    return table_of(device) == "sm_90"


def width(dtype: torch.dtype) -> str:
    """Return which tables a dtype takes: "16bit", or "fp32"."""
    return "fp32" if dtype == torch.float32 else "16bit"


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Return Triton's input precision of a product: PyTorch's setting for float32 on CUDA."""
    if dtype == torch.float32 and device.type == "cuda":
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


def reduction_tile(device: torch.device, dtype: torch.dtype, rank: int) -> ReductionTile:
    """Return the tile of the token-split gradient reduction."""
    exact = device.type == "cuda" and dtype == torch.float32 and precision(dtype, device) == "ieee"
    if exact:
        return REDUCTION_TILES_EXACT[reduction_block(REDUCTION_TILES_EXACT, rank)]
    if device.type != "cuda":
        table = _REDUCTION_TILES_INTERPRETED
    elif dtype != torch.float32:
        table = family_reduction_tiles(family(device))
    else:
        table = REDUCTION_TILES_32BIT
    return overruled_reduction_tile(device, dtype, "reduction", table, rank)


def overruled_reduction_tile(
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    table: Mapping[int, ReductionTile],
    rank: int,
) -> ReductionTile:
    """Return a table's tile for a rank, or what overrules it in the table called ``name``."""
    block = reduction_block(table, rank)
    tile: ReductionTile = overrides.entry(
        table_of(device), name, width(dtype), str(block), table[block]
    )
    return tile


def reduction_block(table: Mapping[int, ReductionTile], rank: int) -> int:
    """Return which of a table's blocks of ranks a rank takes."""
    if rank > 64 and rank % 16 == 0 and 128 in table:
        return 128
    return 16 if rank <= 16 else 32 if rank <= 32 else 64


def family_reduction_tiles(name: str) -> dict[int, ReductionTile]:
    """Return a family's 16-bit tiles of the reduction by the ranks of a block."""
    return _REDUCTION_TILES_BY_FAMILY.get(name, REDUCTION_TILES)


def prompt_tile(element_size: int) -> CopyTile:
    """Return the tile of the launch that places tokens and prompt, by bytes of an element."""
    return PROMPT_TILES[element_size]


def prompt_gradient_tile(element_size: int) -> CopyTile:
    """Return the tile of the prompt's and the table's gradient, by bytes of an element."""
    return PROMPT_GRADIENT_TILES[element_size]
