"""The argument types and constants of every prefix attention launch, for the cross compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft_kernels.core import tiles
from peft_kernels.core.prefix_tiles import (
    PrefixTile,
    head_block,
    prefix_cases,
)

_COMMON = {
    "q_ptr": "*{t}", "lse_ptr": "*fp32", "seed_ptr": "*i64", "stride_qb": "i32",
    "stride_qh": "i32", "stride_qm": "i32", "S": "i32", "T": "i32", "P": "i32",
    "kv_heads": "i32", "group": "i32", "score_scale": "fp32", "inverse_keep": "fp32",
    "drop_threshold": "i32",
}  # fmt: skip
_KEYS = {
    "k_ptr": "*{t}", "v_ptr": "*{t}", "mask_ptr": "*i1", "cu_seqlens_ptr": "*i32",
    "stride_kb": "i32", "stride_kh": "i32", "stride_kn": "i32", "stride_vb": "i32",
    "stride_vh": "i32", "stride_vn": "i32", "stride_mask_b": "i32", "stride_mask": "i32",
    "window": "i32", "segments": "i32", "steps": "i32",
}  # fmt: skip
_PREFIX = {
    "prefix_k_ptr": "*{t}", "prefix_v_ptr": "*{t}", "stride_pkb": "i32", "stride_pkh": "i32",
    "stride_pkn": "i32", "stride_pvb": "i32", "stride_pvh": "i32", "stride_pvn": "i32",
}  # fmt: skip
_BACKWARD = {
    "dout_ptr": "*{t}", "delta_ptr": "*fp32", "correction_ptr": "*fp32", "dlse_ptr": "*fp32",
    "scale": "fp32", "stride_ob": "i32",
    "stride_oh": "i32", "stride_om": "i32",
}  # fmt: skip
_LAUNCHES = {
    "forward": _COMMON | _KEYS | _PREFIX | {
        "gate_ptr": "*fp32", "out_ptr": "*{t}", "prefix_lse_ptr": "*fp32",
    },
    "query": _COMMON | _KEYS | _PREFIX | _BACKWARD | {
        "gate_ptr": "*fp32", "out_ptr": "*{t}", "prefix_lse_ptr": "*fp32", "dq_ptr": "*{t}",
        "prefix_delta_ptr": "*fp32", "prefix_correction_ptr": "*fp32",
    },
    "key": _COMMON | _KEYS | _BACKWARD | {"dk_ptr": "*{t}", "dv_ptr": "*{t}"},
    "prefix": _COMMON | _PREFIX | _BACKWARD | {
        "gate_ptr": "*fp32", "dk_ptr": "*fp32", "dv_ptr": "*fp32", "dk_part_ptr": "*fp32",
        "dv_part_ptr": "*fp32", "counters_ptr": "*i32", "B": "i32",
    },
}  # fmt: skip
KERNELS = {
    "forward": "_prefix_forward_kernel",
    "query": "_prefix_query_gradient_kernel",
    "key": "_prefix_key_gradient_kernel",
    "prefix": "_prefix_gradient_kernel",
}
# What a launch streams, and by TMA is given descriptors of.
_STREAMED = {
    "forward": ("k_ptr", "v_ptr", "prefix_k_ptr", "prefix_v_ptr"),
    "query": ("k_ptr", "v_ptr", "prefix_k_ptr", "prefix_v_ptr"),
    "key": ("q_ptr", "dout_ptr"),
    "prefix": ("q_ptr", "dout_ptr"),
}
# Lengths, head counts and numbers are arbitrary; pointers and strides are aligned where it matters.
_RAGGED = frozenset(
    "S T P B kv_heads group window segments steps score_scale scale inverse_keep drop_threshold "
    "mask_ptr stride_mask_b stride_mask".split()
)


def prefix(
    dtype: str,
    tile: PrefixTile,
    head_size: int,
    launch: str,
    *,
    causal: bool = False,
    window: bool = False,
    packed: bool = False,
    key_mask: bool = False,
    gated: bool = False,
    dropout: bool = False,
    fold: bool = False,
    negate: bool = False,
    ragged: bool = False,
    splits: int = 8,
    **given: Any,
) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of one launch: "forward", "query", "key", "prefix".

    ``ragged``: tiles are not all full. ``given``: constants by their own names.
    """
    types = {name: kind.format(t=dtype) for name, kind in _LAUNCHES[launch].items()}
    constants: dict[str, Any] = {
        "D": head_size, "BLOCK_D": head_block(head_size), "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "DROPOUT": dropout, "FOLD": fold, "NEGATE": negate,
        "PRECISION": "tf32", "TMA": tile.tma,
    }  # fmt: skip
    if launch != "prefix":
        constants |= {"CAUSAL": causal, "WINDOW": window, "PACKED": packed, "KEY_MASK": key_mask}
        constants |= {"stride_mask": 1} if key_mask else {}
    if launch in ("forward", "query"):
        constants |= {"BLOCK_P": tile.block_n, "RAGGED_P": ragged, "GATED": gated}
    if launch == "query":
        constants |= {"NEED_DQ": True}
    if launch in ("key", "prefix"):
        by_tma = tile.tma and not ragged
        constants |= {"NEED_DK": True, "NEED_DV": True, "RAGGED": ragged, "LSE_TMA": by_tma}
    if launch == "prefix":
        constants |= {"GATED": gated, "SPLITS": splits}
    if launch != "forward":
        constants |= {"HAS_DLSE": True}
    if tile.tma:
        rows = tile.block_n if launch in ("forward", "query") else tile.block_m
        for name in _STREAMED[launch]:
            block = given.get("BLOCK_P") or rows if name.startswith("prefix") else rows
            types[name] = f"tensordesc<{dtype}{[1, 1, block, constants['BLOCK_D']]}>"
    if constants.get("LSE_TMA"):
        types |= dict.fromkeys(("lse_ptr", "delta_ptr"), f"tensordesc<fp32{[1, tile.block_m]}>")
    return types, constants | given, frozenset(set(types) - _RAGGED)


def is_plain(source: tuple[dict[str, str], dict[str, Any], frozenset[str]]) -> bool:
    """Return whether a launch has no more than a causal mask."""
    _, constants, _ = source
    return not any(constants.get(name) for name in ("WINDOW", "PACKED", "KEY_MASK", "GATED"))


def gate_gradient(block: int) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return (types, constants, divisible) of the launch that sums the gate's gradient."""
    types = {
        "prefix_delta_ptr": "*fp32", "gate_ptr": "*fp32", "dgate_ptr": "*fp32", "B": "i32",
        "heads": "i32", "S": "i32",
    }  # fmt: skip
    return types, {"BLOCK": block}, frozenset({"prefix_delta_ptr", "gate_ptr", "dgate_ptr"})


# What a launch may have to do at once: what takes the most registers and what is most common first.
_BOUNDED = {"causal": True, "window": True, "packed": True}
_ROWS: tuple[dict[str, Any], ...] = (
    _BOUNDED | {"gated": True, "ragged": True},
    {"causal": True},
    {"causal": True, "ragged": True},
    _BOUNDED | {"key_mask": True},
    {"causal": True, "gated": True, "fold": True},
    {"negate": True},
    {"BLOCK_P": 0},
    {"BLOCK_P": 0, "gated": True},
    {"BLOCK_P": 16},
)
_FORMS: dict[str, tuple[dict[str, Any], ...]] = {
    "forward": _ROWS,
    "query": (
        *_ROWS,
        {"HAS_DLSE": False},
    ),
    "key": (
        _BOUNDED | {"key_mask": True, "ragged": True},
        {"causal": True},
        {"causal": True, "ragged": True},
        {"fold": True, "ragged": True},
        {"NEED_DK": False},
        {"NEED_DV": False, "HAS_DLSE": False, "negate": True},
    ),
    "prefix": (
        {"gated": True, "ragged": True},
        {},
        {"ragged": True},
        {"fold": True, "gated": True, "ragged": True},
        {"splits": 1},
        {"NEED_DK": False},
        {"NEED_DV": False, "HAS_DLSE": False, "negate": True},
    ),
}
_HEAD_SIZES = {64: (64, 32, 16), 128: (128, 80, 96), 256: (256, 192, 160)}


def cases(family: str, dtype: str, *, complete: bool) -> Iterator[tuple[str, Any, PrefixTile]]:
    """Yield (name, (launch, source), tile) of launches of a family.

    ``complete``: every tile with every form and head size, some three thousand kernels over all
    families. Else each family has its share of them: every launch and block of a head, with dropout
    in every other family, in one of the two hardest forms.
    """
    table = "fp32" if dtype == "fp32" else "16bit"
    family_number = tiles.FAMILIES.index(family)
    turn = family_number + (table == "fp32")
    for number, (launch, block, dropout, tile) in enumerate(prefix_cases(family, table)):
        forms, sizes = _FORMS[launch], _HEAD_SIZES[block]
        if not complete:
            if (number + turn) % 2:
                continue
            forms = (forms[(number + turn) // 2 % 2],)
            sizes = (sizes[(number // 2 + family_number) % 3],)
        if tile.tma and launch in ("key", "prefix"):
            forms = tuple(form for form in forms if not form.get("fold"))
        for form in forms:
            for size in sizes:
                source = prefix(dtype, tile, size, launch, dropout=dropout, **form)
                what = " ".join(f"{name}={value}" for name, value in form.items()) or "plain"
                name = f"prefix {launch} d{size} dropout{int(dropout)} {tile} {what}"
                yield name, (launch, source), tile
