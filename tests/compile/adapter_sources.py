"""The argument types and constants of every adapter launch, for the cross compiler."""

from __future__ import annotations

from typing import Any

from peft_kernels.core.adapter_tiles import AdapterTile

_COMMON = {
    "seed_ptr": "*i64", "order_ptr": "*i64", "offsets_ptr": "*i64", "tiles_ptr": "*i64",
    "E1": "i32", "scale": "fp32", "inverse_keep": "fp32", "M": "i32", "D": "i32", "R": "i32",
    "drop_threshold": "i32",
}  # fmt: skip
_FORWARD = _COMMON | {
    "x_ptr": "*{t}", "down_ptr": "*{t}", "up_ptr": "*{t}", "down_bias_ptr": "*{t}",
    "up_bias_ptr": "*{t}", "residual_ptr": "*{t}", "y_ptr": "*{t}", "pre_ptr": "*{t}",
    "stride_xm": "i32", "stride_rm": "i32",
}  # fmt: skip
_BACKWARD = _COMMON | {
    "dy_ptr": "*{t}", "up_ptr": "*{t}", "down_ptr": "*{t}", "pre_ptr": "*{t}",
    "dpre_ptr": "*{t}", "hidden_ptr": "*{t}", "dx_ptr": "*{t}", "stride_dym": "i32",
}  # fmt: skip
_RAGGED = {"M", "E1", "drop_threshold", "scale", "inverse_keep"}


def adapter(
    dtype: str,
    tile: AdapterTile,
    block: int,
    direction: str,
    *,
    activation: str = "gelu",
    dropout: bool = False,
    scale: int = 1,
    groups: int = 0,
    ragged: bool = False,
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of one launch; D and R are multiples of 16, or not."""
    types = _FORWARD if direction == "forward" else _BACKWARD
    types = {name: kind.format(t=dtype) for name, kind in types.items()}
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m, "BLOCK_D": tile.block_d, "BLOCK_R": block,
        "ACTIVATION": activation, "DROPOUT": dropout, "SCALE": scale, "GROUPS": groups,
        "AHEAD": tile.ahead,
        "PRECISION": "tf32",
    }  # fmt: skip
    if direction == "forward":
        constants |= {"HAS_DOWN_BIAS": True, "HAS_UP_BIAS": True, "RESIDUAL": True}
    else:
        constants |= dict.fromkeys(("NEED_DPRE", "NEED_HIDDEN", "NEED_DX", "INPUT_RESIDUAL"), True)
    if scale > 1:
        types["scale"] = "*fp32"
    loose = _RAGGED | ({"D", "R", "stride_xm", "stride_rm", "stride_dym"} if ragged else set())
    return types, constants, frozenset(set(types) - loose)


def keep_mask() -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of the launch that writes the mask."""
    types = {
        "keep_ptr": "*i1", "seed_ptr": "*i64", "M": "i32", "C": "i32", "drop_threshold": "i32",
    }  # fmt: skip
    return types, {"BLOCK_M": 32, "BLOCK_C": 64}, frozenset({"keep_ptr", "seed_ptr", "C"})
