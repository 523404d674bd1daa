"""The argument types and constants of the grouped LoRA launches, for the cross compiler."""

from __future__ import annotations

from typing import Any

from peft_kernels.core.lora_tiles import LoRATile, rank_block
from peft_kernels.core.projections_tiles import MOST, common_ranks

_ONWARD, _BACK = "_projections_kernel", "_projections_gradient_kernel"
KERNELS = {"forward": _ONWARD, "dropped": _ONWARD, "backward": _BACK, "masked": _BACK}
_EACH = {
    "w{}_ptr": "*{t}", "a{}_ptr": "*{t}", "b{}_ptr": "*{t}", "seed{}_ptr": "*i64",
    "scale{}": "fp32", "inverse{}": "fp32", "threshold{}": "i32", "N{}": "i32",
    "R{}": "i32", "stride_w{}": "i32",
}  # fmt: skip
_FORWARD = {"bias{}_ptr": "*{t}", "y{}_ptr": "*{t}", "s{}_ptr": "*{t}"}
_BACKWARD = {"dy{}_ptr": "*{t}", "ds{}_ptr": "*{t}", "stride_dy{}": "i32"}
_COMMON = {"counters_ptr": "*i32", "M": "i32", "K": "i32"}


def source(
    dtype: str,
    tile: LoRATile,
    rank: int,
    direction: str,
    *,
    ragged: bool = False,
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of a grouped launch of four projections."""
    forward = KERNELS[direction] == _ONWARD
    each = _EACH | (_FORWARD if forward else _BACKWARD)
    types = {
        name.format(index): kind.format(t=dtype)
        for name, kind in each.items()
        for index in range(MOST)
    }
    types |= _COMMON
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "BLOCK_R": rank_block(rank), "GROUP_M": tile.group_m, "EVEN_K": not ragged,
        "DROPOUT": direction in ("dropped", "masked"), "WEIGHT_ROWS": True,
        "SCALE_IS_POINTER": ragged, "PRECISION": "tf32",
    }  # fmt: skip
    if forward:
        types |= {"x_ptr": f"*{dtype}", "stride_xm": "i32"}
        common = common_ranks(rank, MOST)
        constants |= {"COMMON_R": common, "COLUMNS": common * MOST, "BIASES": 0b1011}
    else:
        types |= {"dx_ptr": f"*{dtype}"}
        constants |= {"GROUPS": MOST}
    if ragged:  # as under torch.compile
        types |= {f"scale{index}": "*fp32" for index in range(MOST)}
    # The seeds that one launch draws lie eight bytes apart.
    loose = {"M", "seed1_ptr", "seed3_ptr"}
    loose |= {f"{name}{index}" for name in ("R", "threshold", "inverse") for index in range(MOST)}
    loose |= {f"scale{index}" for index in range(MOST)}
    if ragged:
        loose |= {"K", "stride_xm"}
        loose |= {f"{n}{index}" for n in ("N", "stride_w", "stride_dy") for index in range(MOST)}
    return types, constants, frozenset(set(types) - loose)
