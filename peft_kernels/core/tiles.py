"""Tile tables: which kernel variant and block sizes run, per GPU family and shape class.

Data, not code. Every tile here cross-compiles without spills for its families
(``tests/compile``); which of them is fastest has been measured only where ``bench/results`` says
so, the rest is reasoned from the sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from peft_kernels.core import triton_runtime

FAMILIES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
VARIANTS = ("ticket", "recompute", "split")


@dataclass(frozen=True)
class LoRATile:
    """How one launch of a LoRA product runs.

    Attributes:
        variant: "ticket" (producers of s and output tiles in one launch, ordered by an atomic
            ticket), "recompute" (every output tile computes its own s), or "split" (library GEMM,
            then s, then the rank-r update).
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


@dataclass(frozen=True)
class ReductionTile:
    """Block sizes of the token-split gradient reduction: BLOCK_M tokens by BLOCK_C columns."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


# Keyed by family, then by shape class: "decode" is at most 16 tokens, "small" at most 256, "large"
# the rest; "masked" is a large backward under dropout, whose epilogue needs registers for the mask.
_WIDE = {
    "decode": LoRATile("recompute", 16, 64, 128, 4, 4),
    "small": LoRATile("ticket", 64, 64, 64, 4, 4),
    "large": LoRATile("ticket", 128, 256, 64, 8, 3),
    "masked": LoRATile("ticket", 128, 128, 64, 8, 3),
}
_LORA_16BIT: dict[str, dict[str, LoRATile]] = {
    "sm_80": {
        **_WIDE,
        "large": LoRATile("ticket", 128, 128, 64, 8, 3),
        "masked": LoRATile("ticket", 128, 128, 32, 8, 4),
    },
    "sm_86": {
        **_WIDE,
        "decode": LoRATile("recompute", 16, 64, 128, 4, 3),
        "large": LoRATile("ticket", 128, 128, 32, 8, 3),
        "masked": LoRATile("ticket", 128, 128, 32, 8, 3),
    },
    "sm_90": _WIDE,
    "sm_100": _WIDE,
}
_LORA_16BIT["sm_89"] = _LORA_16BIT["sm_120"] = _LORA_16BIT["sm_86"]

# float32 with tf32 products. Exact float32 products belong to the GEMM library ("split").
_LORA_TF32 = {
    "decode": LoRATile("recompute", 16, 64, 64, 4, 3),
    "small": LoRATile("ticket", 64, 64, 32, 4, 3),
    "large": LoRATile("ticket", 128, 64, 32, 8, 3),
    "masked": LoRATile("ticket", 64, 64, 32, 8, 3),
}
# What computes s alone, for "split" and for a backward that needs no dx.
LOW_RANK_TILE = LoRATile("split", 64, 64, 64, 4, 3)
LOW_RANK_TILE_32BIT = LoRATile("split", 32, 64, 64, 4, 3)
_INTERPRETED = LoRATile("ticket", 32, 32, 32, 4, 1)

REDUCTION_TILE = ReductionTile(64, 64, 4, 3)
REDUCTION_TILE_32BIT = ReductionTile(32, 64, 4, 3)
REDUCTION_TILE_INTERPRETED = ReductionTile(32, 32, 4, 1)

_forced: str | None = None


def family(device: torch.device) -> str:
    """Return the family of a CUDA device, the newest known one that it can run."""
    major, minor = triton_runtime.capability(device.index or 0)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89" if minor == 9 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Return Triton's input precision of a product: PyTorch's setting for float32 on CUDA."""
    if dtype == torch.float32 and device.type == "cuda":
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


@contextlib.contextmanager
def forced_variant(variant: str | None) -> Iterator[None]:
    """Make LoRA launches take one variant, for tests and benchmarks; not for several threads.

    "recompute" is served by "ticket" where it cannot run: ranks above 64, and dropout in backward.
    """
    global _forced
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    before, _forced = _forced, variant
    try:
        yield
    finally:
        _forced = before


def _table(device: torch.device, dtype: torch.dtype) -> dict[str, LoRATile]:
    if device.type != "cuda":
        return dict.fromkeys(("decode", "small", "large", "masked"), _INTERPRETED)
    return _LORA_TF32 if dtype == torch.float32 else _LORA_16BIT[family(device)]


def lora_tile(
    device: torch.device, dtype: torch.dtype, tokens: int, rank: int, masked: bool
) -> LoRATile:
    """Return how a LoRA product runs.

    Args:
        device: where.
        dtype: float32, float16 or bfloat16.
        tokens: M.
        rank: r.
        masked: dropout acts on the output (backward), not on the input (forward).
    """
    table = _table(device, dtype)
    shape_class = "decode" if tokens <= 16 else "small" if tokens <= 256 else "large"
    if masked and shape_class != "small":
        shape_class = "masked"
    tile = table[shape_class]
    exact = dtype == torch.float32 and device.type == "cuda" and precision(dtype, device) == "ieee"
    variant = _forced or ("split" if exact else tile.variant)
    if variant == "recompute" and (rank > 64 or masked):
        variant = "ticket"
    if variant == tile.variant:
        return tile
    return LoRATile(
        variant, tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages
    )


def low_rank_tile(device: torch.device, dtype: torch.dtype) -> LoRATile:
    """Return the tile of the launch that computes s alone."""
    if device.type != "cuda":
        return _INTERPRETED
    return LOW_RANK_TILE_32BIT if dtype == torch.float32 else LOW_RANK_TILE


def reduction_tile(device: torch.device, dtype: torch.dtype) -> ReductionTile:
    """Return the tile of the token-split gradient reduction."""
    if device.type != "cuda":
        return REDUCTION_TILE_INTERPRETED
    return REDUCTION_TILE_32BIT if dtype == torch.float32 else REDUCTION_TILE


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
    forward = lora_tile(device, dtype, tokens, rank, masked=False)
    backward = lora_tile(device, dtype, tokens, rank, masked=dropout)
    return f"forward {forward}; backward {backward}"


def lora_cases() -> Iterator[tuple[str, str, str, LoRATile]]:
    """Yield (family, dtype, shape class, tile) of every LoRA launch the tables can choose."""
    for name in FAMILIES:
        for shape_class, tile in _LORA_16BIT[name].items():
            for dtype in ("bf16", "fp16"):
                yield name, dtype, shape_class, tile
        for shape_class, tile in _LORA_TF32.items():
            yield name, "fp32", shape_class, tile
