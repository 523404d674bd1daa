"""The argument types and constants of the token-split reduction, for the cross compiler."""

from __future__ import annotations

from typing import Any

from peft_kernels.core.tiles import ReductionTile

_TYPES = {
    "v0_ptr": "*{t}", "low0_ptr": "*{t}", "out0_ptr": "*{t}", "lowsum_ptr": "*{t}",
    "v1_ptr": "*{t}", "low1_ptr": "*{t}", "out1_ptr": "*{t}", "colsum_ptr": "*{t}",
    "part0_ptr": "*fp32", "lowsum_part_ptr": "*fp32", "part1_ptr": "*fp32",
    "colsum_part_ptr": "*fp32", "counters_ptr": "*i32", "seed_ptr": "*i64",
    "order_ptr": "*i64", "offsets_ptr": "*i64", "w_ptr": "*{t}", "bias_ptr": "*{t}",
    "scale": "fp32", "inverse_keep": "fp32", "scale_part_ptr": "*fp32", "d_scale_ptr": "*fp32",
    "M": "i32", "C0": "i32", "C1": "i32", "R": "i32", "stride_v0m": "i32", "stride_v1m": "i32",
    "stride_out0_c": "i32", "stride_out0_r": "i32", "stride_out1_c": "i32",
    "stride_out1_r": "i32", "tiles0": "i32", "tiles1": "i32", "drop_threshold": "i32",
}  # fmt: skip
# Arbitrary numbers; everything else is aligned in the case that matters.
_RAGGED = {
    "R", "M", "tiles0", "tiles1", "drop_threshold", "scale", "inverse_keep", "offsets_ptr",
    "stride_out0_c", "stride_out0_r", "stride_out1_c", "stride_out1_r",
}  # fmt: skip
# The numbers among these that are multiples of R.
_OF_RANK = {"R", "stride_out1_c"}
# Where the features are no multiple of 16.
_UNALIGNED = {"C0", "C1", "stride_v0m", "stride_v1m"}


def lora(
    dtype: str,
    tile: ReductionTile,
    dropout: bool,
    splits: int,
    precision: str = "tf32",
    *,
    unaligned: bool = False,
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of the gradients of LoRA's factors."""
    return _source(
        dtype, tile, unaligned, DROPOUT=0 if dropout else -1, SPLITS=splits, PRECISION=precision
    )


def adapter(
    dtype: str,
    tile: ReductionTile,
    dropout: bool,
    splits: int,
    scale: int,
    grouped: bool,
    *,
    unaligned: bool = False,
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of the gradients of an adapter's parameters."""
    return _source(
        dtype, tile, unaligned, DROPOUT=1 if dropout else -1, SPLITS=splits, LOWSUM=True,
        SCALE=scale, SCALE_GRAD=max(0, scale - 1), HAS_BIAS=True, GROUPED=grouped,
    )  # fmt: skip


def _source(
    dtype: str, tile: ReductionTile, unaligned: bool, **changes: Any
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    types = {name: kind.format(t=dtype) for name, kind in _TYPES.items()}
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "BLOCK_R": tile.block_r,
        "PRODUCT0": True, "LOWSUM": False, "PRODUCT1": True, "COLSUM": True, "SCALE": 0,
        "SCALE_GRAD": 0, "HAS_BIAS": False, "GROUPED": False, "PRODUCT_SUMS": tile.product_sums,
        "PRECISION": "tf32",
        "stride_out0_c": 1, "stride_out1_r": 1,
    }  # fmt: skip
    constants |= changes
    if constants["SCALE"] > 1:
        types["scale"] = "*fp32"
    # Ranks that are no multiples of 16 take smaller blocks.
    ragged = _RAGGED - (_OF_RANK if tile.block_r > 64 else set())
    return types, constants, frozenset(set(types) - ragged - (_UNALIGNED if unaligned else set()))
