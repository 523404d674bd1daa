"""The argument types and constants of every LoRA launch, for the cross compiler."""

from __future__ import annotations

from typing import Any

from peft_kernels.core.lora_tiles import (
    LoRATile,
    low_rank_rows,
    low_rank_stages,
    rank_block,
    store_slices,
)

_LOW_RANK = {
    "x_ptr": "*{t}", "a_ptr": "*{t}", "s_ptr": "*{t}", "seed_ptr": "*i64", "scale": "fp32",
    "inverse_keep": "fp32", "M": "i32", "K": "i32", "R": "i32", "stride_xm": "i32",
    "stride_ar": "i32", "stride_ak": "i32", "drop_threshold": "i32",
}  # fmt: skip
_PRODUCT = _LOW_RANK | {
    "w_ptr": "*{t}", "b_ptr": "*{t}", "bias_ptr": "*{t}", "y_ptr": "*{t}",
    "counters_ptr": "*i32", "N": "i32", "stride_wn": "i32", "stride_wk": "i32",
    "stride_bn": "i32", "stride_br": "i32",
}  # fmt: skip
_MASKED_UPDATE = {
    "y_ptr": "*{t}", "s_ptr": "*{t}", "b_ptr": "*{t}", "seed_ptr": "*i64", "M": "i32", "N": "i32",
    "R": "i32", "stride_bn": "i32", "stride_br": "i32", "drop_threshold": "i32",
}  # fmt: skip
# Ranks and threshold are arbitrary numbers; everything else is aligned in the case that matters.
_RAGGED = {"R", "drop_threshold", "M", "stride_ar", "stride_ak", "stride_bn", "stride_br"}


def _typed(types: dict[str, str], dtype: str) -> dict[str, str]:
    return {name: kind.format(t=dtype) for name, kind in types.items()}


def product(
    dtype: str,
    tile: LoRATile,
    rank: int,
    direction: str,
    dropout: int,
    *,
    ragged: bool = False,
    scale_is_pointer: bool = False,
    even_k: bool = True,
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of a ticket or recompute launch."""
    types = _typed(_PRODUCT, dtype)
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "BLOCK_R": rank_block(rank), "GROUP_M": tile.group_m, "EVEN_K": even_k and not ragged,
        "DROPOUT": dropout, "HAS_BIAS": direction == "forward",
        "SCALE_IS_POINTER": scale_is_pointer,
        "PRECISION": "tf32",
    }  # fmt: skip
    if scale_is_pointer:
        types["scale"] = "*fp32"
    # The strides that are 1 in each direction: weight row-major, A and B contiguous.
    unit = ("stride_wk", "stride_ak", "stride_br")
    if direction == "backward":
        unit = ("stride_wn", "stride_ar", "stride_bn")
    constants |= dict.fromkeys(unit, 1)
    loose = _RAGGED | ({"K", "N", "stride_xm", "stride_wn", "stride_wk"} if ragged else set())
    return types, constants, frozenset(set(types) - loose - {"scale", "inverse_keep"})


def tma_product(
    dtype: str, tile: LoRATile, rank: int, direction: str, dropout: int
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of a ticket launch by TMA."""
    types, constants, divisible = product(dtype, tile, rank, direction, dropout)
    w_block = (tile.block_n, tile.block_k)
    if direction == "backward":
        w_block = (tile.block_k, tile.block_n)
    slices = store_slices(tile, dropout == 2)
    blocks = {
        "x_desc": (tile.block_m, tile.block_k),
        "rows_desc": (low_rank_rows(tile), tile.block_k),
        "w_desc": w_block,
        "y_desc": (tile.block_m, tile.block_n // slices),
    }
    types |= {name: f"tensordesc<{dtype}{list(block)}>" for name, block in blocks.items()}
    constants |= {
        "K_INNER": direction == "forward", "THREADS": 32 * tile.num_warps,
        "LOW_RANK_STAGES": low_rank_stages(tile), "SLICES": slices,
        "BLOCK_P": low_rank_rows(tile), "EIGHTS": 0,
    }  # fmt: skip
    # Every stride of A and B that is not the rank is a multiple of 16.
    ranks = "stride_ak" if direction == "backward" else "stride_bn"
    strides = {"stride_ar", "stride_ak", "stride_bn", "stride_br"} - set(constants) - {ranks}
    if rank % 16:
        constants["EIGHTS"] = 2 if direction == "backward" else 1
        return types, constants, divisible | strides
    return types, constants, divisible | {"R", ranks} | strides


def low_rank(
    dtype: str,
    tile: LoRATile,
    rank: int,
    dropout: int,
    scale_is_pointer: bool = False,
    precision: str = "tf32",
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of the launch that computes s alone."""
    types = _typed(_LOW_RANK, dtype)
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": rank_block(rank),
        "DROPOUT": dropout, "SCALE_IS_POINTER": scale_is_pointer, "PRECISION": precision,
        "stride_ak": 1,
    }  # fmt: skip
    if scale_is_pointer:
        types["scale"] = "*fp32"
    return types, constants, frozenset(set(types) - _RAGGED - {"scale", "inverse_keep"})


def masked_update(
    dtype: str, tile: LoRATile, rank: int, precision: str = "tf32"
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of "split"'s last launch in backward."""
    types = _typed(_MASKED_UPDATE, dtype)
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_R": rank_block(rank),
        "PRECISION": precision, "stride_bn": 1,
    }  # fmt: skip
    return types, constants, frozenset(set(types) - _RAGGED)
