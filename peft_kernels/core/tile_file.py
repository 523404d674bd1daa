"""Files of tiles: what ``bench.tune`` measured on one GPU, for this package to take there.

    {"families": {"sm_90": {
        "lora": {"16bit": {"large": "ticket 128x256x64x8x4", "tma large": "ticket_tma ..."}},
        "prefix": {"16bit": {"key 128 dropout": "32x128x8x2", "tma key 64": "64x64x4x2/168"}},
        "adapter": {"16bit": {"many forward 64": "64x128x8x3"}},
        "reduction": {"16bit": {"64": "64x128x64x8x3 sums"}}, "adapter reduction": {...},
        "limits": {"tma_from": {"large": 34359738368}, "split_from": {"queries": null}}}}}

Sizes are those of the tile's dataclass in its order, warps and stages last, then, of prefix
attention, a bound of registers. A "tma" entry of prefix attention may be null: by pointers. What is
not named is left to the tables; everything beside "families" is for people. An entry that no table
has, or a tile that no launch could run, is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_kernels.core import adapter_tiles, lora_tables, prefix_tiles, tiles
from peft_kernels.core.adapter_tiles import AdapterTile
from peft_kernels.core.lora_tables import LoRATile
from peft_kernels.core.overrides import VARIABLE, Key, Overrides
from peft_kernels.core.prefix_tiles import PrefixTile
from peft_kernels.core.tiles import ReductionTile

WIDTHS = {"16bit": 2, "fp32": 4}  # bytes of an element
SHARED_LIMIT_KIB = tiles.SHARED_LIMIT_KIB | {tiles.INTERPRETED: 227}
_CLASSES = tuple(
    name + suffix
    for name in ("decode", "small", "large", "dropped", "backward", "masked")
    for suffix in ("", "+")
)
_TMA_CLASSES = tuple(lora_tables.TMA["sm_90"])
_BY_TMA = (*lora_tables.TMA, tiles.INTERPRETED)
_BLOCKS = (16, 32, 64, 128, 256)
# The names that each table has.
NAMES: dict[str, tuple[str, ...]] = {
    "lora": (*_CLASSES, *(f"tma {name}" for name in _TMA_CLASSES)),
    "prefix": (
        *(
            prefix_tiles.entry_name(launch, size, dropout)
            for launch in prefix_tiles.LAUNCHES
            for size in (64, 128, 256)
            for dropout in (False, True)
        ),
        *(f"tma {launch} {size}" for launch in prefix_tiles.LAUNCHES for size in (64, 128)),
    ),
    "adapter": tuple(
        f"{shape_class} {direction} {block}"
        for shape_class in ("few", "many", "ragged")
        for direction in adapter_tiles.DIRECTIONS
        for block in _BLOCKS
    ),
    "reduction": ("16", "32", "64", "128"),
    "adapter reduction": ("16", "32", "64", "128"),
}
# Limits may be null: never.
LIMITS: dict[str, tuple[str, ...]] = {
    "tma_from": _TMA_CLASSES,
    "split_from": ("queries",),
    "few_tokens": ("adapter",),
}


def load(path: str | Path) -> Overrides:
    """Return the entries of a file.

    Raises:
        ValueError: it cannot be read, names something unknown or a tile that cannot run.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}: {path} cannot be read as JSON: {error}") from error
    try:
        return Overrides(dict(_entries(content)), str(path))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {path}: {error}") from error


def dumped(entries: Mapping[Key, Any]) -> dict[str, Any]:
    """Return entries as the value of "families" that ``load`` reads."""
    families: dict[str, Any] = {}
    for (family, table, width, name), value in entries.items():
        group = families.setdefault(family, {}).setdefault(table, {}).setdefault(width, {})
        group[name] = value if table == "limits" or value is None else text(value)
    return families


def text(tile: LoRATile | PrefixTile | AdapterTile | ReductionTile) -> str:
    """Return a tile as a file spells it."""
    if isinstance(tile, LoRATile):
        if tile.variant == "split":
            return "split"
        sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}x{tile.num_warps}x{tile.num_stages}"
        return f"{tile.variant} {sizes}" + (f" group {tile.group_m}" if tile.group_m != 8 else "")
    if isinstance(tile, PrefixTile):
        bound = f"/{tile.registers}" if tile.registers else ""
        return f"{tile.block_m}x{tile.block_n}x{tile.num_warps}x{tile.num_stages}{bound}"
    if isinstance(tile, AdapterTile):
        return f"{tile.block_m}x{tile.block_d}x{tile.num_warps}x{tile.num_stages}"
    sizes = f"{tile.block_m}x{tile.block_c}x{tile.block_r}x{tile.num_warps}x{tile.num_stages}"
    return sizes + " sums" * tile.product_sums


def parsed(family: str, table: str, width: str, name: str, value: object) -> Any:
    """Return the tile or number of one entry.

    Raises:
        ValueError: there is no such entry, or no launch could run it.
    """
    place = f"{family}/{table}/{width}/{name}"
    if family not in SHARED_LIMIT_KIB:
        raise ValueError(f"family must be one of {', '.join(tiles.FAMILIES)}, got {family!r}")
    if table == "limits":
        _known(f"{family}/limits", width, LIMITS)
        _known(f"{family}/limits/{width}", name, LIMITS[width])
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{place}: must be a number that is not negative, or null")
        if width == "few_tokens" and value is None:
            raise ValueError(f"{place}: must be a number of tokens, got null")
        return value
    _known(family, table, NAMES)
    _known(f"{family}/{table}", width, WIDTHS)
    _known(f"{family}/{table}/{width}", name, NAMES[table])
    if value is None and table == "prefix" and name.startswith("tma "):
        return None  # by pointers
    try:
        tile, problem = _READERS[table](family, WIDTHS[width], name, str(value))
    except (TypeError, AttributeError):
        raise ValueError(f"{place}: {value!r} is no tile of {table}") from None
    if problem is not None:
        raise ValueError(f"{place}: {value} {problem}")
    return tile


def problem_of(family: str, table: str, width: str, name: str, tile: Any) -> str | None:
    """Return why a tile cannot be the entry of that name, or None."""
    problem: str | None = _READERS[table](family, WIDTHS[width], name, text(tile))[1]
    return problem


def _entries(content: Any) -> Iterator[tuple[Key, Any]]:
    if not isinstance(content, dict) or not isinstance(content.get("families"), dict):
        raise ValueError('must hold an object called "families"')
    for family, found in content["families"].items():
        for table, widths in _items(family, found):
            for width, names in _items(f"{family}/{table}", widths):
                for name, value in _items(f"{family}/{table}/{width}", names):
                    key = (family, table, width, name)
                    yield key, parsed(*key, value)


def _items(place: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object, got {value!r}")
    return value.items()


def _known(place: str, name: str, allowed: Any) -> None:
    if name not in allowed:
        raise ValueError(f"{place}: must be one of {', '.join(allowed)}; got {name!r}")


def _impossible(
    family: str, blocks: tuple[int, ...], warps: int, stages: int, accumulated: int, loaded: int
) -> str | None:
    """Return what keeps any kernel from running a tile.

    Args:
        family: of GPUs.
        blocks: its sizes.
        warps: of a program.
        stages: of the pipeline.
        accumulated: float32 values that a program holds.
        loaded: bytes that a stage of the pipeline holds at least.
    """
    if any(size < 16 or size > 512 or size & (size - 1) for size in blocks):
        return "has a size that is no power of two from 16 to 512"
    if warps not in (1, 2, 4, 8, 16):
        return "has a number of warps that is not 1, 2, 4, 8 or 16"
    if not 1 <= stages <= 8:
        return "has a number of stages that is not 1 to 8"
    registers = accumulated // (32 * warps)
    if registers > 255 and family != "sm_100":  # whose tensor cores have a memory of their own
        return f"needs {registers} registers a thread for its sums alone, of 255"
    # A pipeline by asynchronous copies keeps one stage fewer than it is deep.
    kib = max(1, stages - 1) * loaded / 1024
    if kib > SHARED_LIMIT_KIB[family]:
        return f"needs {kib:.0f} KiB of shared memory, {family} has {SHARED_LIMIT_KIB[family]}"
    return None


def _sizes(value: str, count: int) -> list[int]:
    sizes = re.fullmatch("x".join([r"(\d+)"] * count), value)
    return [int(size) for size in sizes.groups()]  # type: ignore[union-attr]  # read by ``parsed``


def _lora(family: str, itemsize: int, name: str, value: str) -> tuple[LoRATile, str | None]:
    if value == "split":
        by_tma = "cannot be a tile by TMA" if name.startswith("tma ") else None
        return LoRATile("split", 64, 64, 64, 4, 3), by_tma
    match = re.fullmatch(r"(\w+) ([\dx]+)(?: group (\d+))?", value)
    variant, sizes, group = match.groups()  # type: ignore[union-attr]
    m, n, k, warps, stages = _sizes(sizes, 5)
    tile = LoRATile(variant, m, n, k, warps, stages, int(group or 8))
    loaded = (m + n) * k * itemsize
    problem = _impossible(family, (m, n, k), warps, stages, m * n, loaded)
    if variant not in lora_tables.VARIANTS:
        problem = f"is of no variant of {', '.join(lora_tables.VARIANTS)}"
    elif not 1 <= tile.group_m <= 64:
        problem = "has a group that is not 1 to 64"
    elif (variant == "ticket_tma") != name.startswith("tma "):
        problem = 'must be "ticket_tma" in entries of "tma", and there alone'
    elif variant == "ticket_tma" and (
        itemsize > 2 or family not in (*lora_tables.TMA, "interpreted")
    ):
        problem = "goes by TMA, which 16-bit dtypes on Hopper do"
    elif variant == "ticket_tma" and stages * loaded > 1024 * SHARED_LIMIT_KIB[family]:
        problem = f"needs {stages * loaded // 1024} KiB of shared memory"
    elif variant == "recompute" and name.startswith("masked"):
        problem = "makes its own s, which a masked product cannot"
    return tile, problem


def _prefix(family: str, itemsize: int, name: str, value: str) -> tuple[PrefixTile, str | None]:
    sizes, _, bound = value.partition("/")
    m, n, warps, stages = _sizes(sizes, 4)
    by_tma = name.startswith("tma ")
    launch, size = name.removeprefix("tma ").split()[:2]
    head = int(size)
    # Out and the scores, or dq; dk and dv of a block of keys.
    held = 2 * n * head if launch in ("key", "prefix") else m * head
    streamed = m if launch in ("key", "prefix") else n
    tile = PrefixTile(m, n, warps, stages, by_tma, int(bound or 0))
    problem = _impossible(family, (m, n), warps, stages, held, 2 * streamed * head * itemsize)
    if bound and not 32 <= tile.registers <= 255:
        problem = "bounds registers to a number that is not 32 to 255"
    if by_tma and (itemsize > 2 or family not in _BY_TMA):
        problem = "goes by TMA, which 16-bit dtypes on Hopper do"
    return tile, problem


def _adapter(family: str, itemsize: int, name: str, value: str) -> tuple[AdapterTile, str | None]:
    m, d, warps, stages = _sizes(value, 4)
    block = int(name.split()[2])
    tile = AdapterTile("fused", m, d, warps, stages)
    loaded = (m + block) * d * itemsize
    return tile, _impossible(family, (m, d), warps, stages, m * max(block, d), loaded)


def _reduction(
    family: str, itemsize: int, name: str, value: str
) -> tuple[ReductionTile, str | None]:
    m, c, r, warps, stages = _sizes(value.removesuffix(" sums"), 5)
    tile = ReductionTile(m, c, r, warps, stages, value.endswith(" sums"))
    problem = _impossible(family, (m, c, r), warps, stages, c * r, m * (c + r) * itemsize)
    return tile, problem if r <= int(name) else f"has blocks of {r} ranks, where {name} is the most"


_READERS: dict[str, Callable[[str, int, str, str], tuple[Any, str | None]]] = {
    "lora": _lora,
    "prefix": _prefix,
    "adapter": _adapter,
    "reduction": _reduction,
    "adapter reduction": _reduction,
}
