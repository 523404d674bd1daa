"""What is tuned, in the order of what it is worth, and the tiles that are tried for it."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.adapter.cases import CASES as ADAPTER_CASES
from bench.lora.cases import GPU_CASES
from bench.method import GPU
from bench.prefix import CASES as PREFIX_CASES
from bench.tuning import launches
from bench.tuning.launches import Make, SumCase
from peft_kernels.core import adapter_tiles, lora_tables, lora_tiles, prefix_tiles, tile_file, tiles
from peft_kernels.core.adapter_tiles import AdapterTile
from peft_kernels.core.lora_tables import LoRATile
from peft_kernels.core.overrides import Key, Overrides, forced
from peft_kernels.core.prefix_tiles import PrefixTile
from peft_kernels.core.tiles import ReductionTile

WIDTH = "16bit"
METHODS = ("prefix", "lora", "adapter", "reduction")


@dataclass(frozen=True)
class Target:
    """An entry of a table, and the launches that take it.

    Attributes:
        method: which of ``METHODS`` it belongs to.
        table: of a file of tiles.
        name: of the entry.
        launch: what ``make`` calls the launch.
        make: makes it of a case.
        cases: that it is timed at.
    """

    method: str
    table: str
    name: str
    launch: str
    make: Make
    cases: tuple[Any, ...]

    def __str__(self) -> str:
        """Return its place in a file of tiles."""
        return f"{self.table}/{self.name}"


class _Noting(dict[Key, Any]):
    """Notes which entries were read: a tile that no launch takes would be timed for nothing."""

    def __init__(self, entries: Mapping[Key, Any]) -> None:
        super().__init__(entries)
        self.read: set[Key] = set()

    def __getitem__(self, key: Key) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@dataclass(frozen=True)
class Candidate:
    """A tile that is tried for an entry.

    Attributes:
        entry: the entry's key; one by TMA has its own.
        tile: the tile, None: what the tables say, without being forced.
        variant: of LoRA or of prefix attention, forced.
        beside: further entries that let a launch take the tile.
        overrides: what lets launches take the tile.
    """

    entry: Key
    tile: Any
    variant: str | None = None
    beside: tuple[tuple[Key, Any], ...] = ()
    overrides: Overrides | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Make the overrides: one object for all of its launches."""
        made = (
            None
            if self.tile is None
            else Overrides(_Noting({self.entry: self.tile, **dict(self.beside)}))
        )
        object.__setattr__(self, "overrides", made)

    def __str__(self) -> str:
        """Return the tile as a file spells it, "tma" before one of prefix attention by TMA."""
        if self.tile is None:
            return "present"
        return "tma " * getattr(self.tile, "tma", False) + tile_file.text(self.tile)

    @property
    def taken(self) -> bool:
        """Whether a launch has looked the tile up."""
        entries = None if self.overrides is None else self.overrides.entries
        return isinstance(entries, _Noting) and self.entry in entries.read

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Make launches take it."""
        of = prefix_tiles if self.entry[1] == "prefix" else lora_tiles
        with forced(self.overrides), of.forced_variant(self.variant):
            yield


def _lora_targets() -> Iterator[Target]:
    cases = {case.name: case for case in GPU_CASES}
    for direction, drop, names in (
        ("forward", 0, ("large", "large+")), ("forward", 0.1, ("dropped", "dropped+")),
        ("backward", 0, ("backward", "backward+")), ("backward", 0.1, ("masked", "masked+")),
    ):  # fmt: skip
        few = ("llama3-8b.q M8192 r16", "llama3-8b.gate M4096 r16", "qwen2.5-7b.q M2048 r16")
        many = ("llama3-8b.down M4096 r64", "llama3-8b.q M8192 r64")
        for name, shapes in zip(names, (few, many), strict=True):
            chosen = tuple(cases[f"{shape} p{drop:g}"] for shape in shapes)
            yield Target("lora", "lora", name, direction, launches.lora, chosen)
    for name, tokens in (("small", 256), ("decode", 16)):
        chosen = tuple(cases[f"llama3-8b.{each} M{tokens} r16 p0"] for each in ("q", "down"))
        yield Target("lora", "lora", name, "forward", launches.lora, chosen)


def _prefix_targets() -> Iterator[Target]:
    b32, b8, b2, d64, wide, wider = (
        case for case in PREFIX_CASES if case.suite == GPU and not case.decoding
    )
    for launch, size, chosen in (
        ("key", 128, (b8, b32)), ("query", 128, (b8, b32)), ("forward", 128, (b8, wider, b32)),
        ("prefix", 128, (wide, wider)), ("key", 64, (d64,)), ("query", 64, (d64,)),
        ("forward", 64, (d64,)), ("prefix", 64, (d64,)),
    ):  # fmt: skip
        yield Target("prefix", "prefix", f"{launch} {size}", launch, launches.prefix, chosen)
    for launch in ("key", "query", "forward"):
        name = f"{launch} 128 dropout"
        yield Target("prefix", "prefix", name, f"{launch} 0.1", launches.prefix, (b8,))


def _adapter_targets() -> Iterator[Target]:
    cases = {
        (case.features, case.bottleneck): case
        for case in ADAPTER_CASES
        if case.suite == GPU and not case.dropout_p
    }
    for block, widths in ((64, (2048, 4096)), (16, (768, 8192)), (128, (4096, 8192))):
        for direction in adapter_tiles.DIRECTIONS:
            chosen = tuple(cases[width, block] for width in widths)
            name = f"many {direction} {block}"
            yield Target("adapter", "adapter", name, direction, launches.adapter, chosen)


def _reduction_targets() -> Iterator[Target]:
    for name, sizes in (
        ("16", ((8192, 4096, 4096, 16), (2048, 3584, 3584, 16))),
        ("64", ((4096, 14336, 4096, 64),)),
        ("128", ((4096, 8192, 8192, 256),)),
    ):
        chosen = tuple(SumCase(f"{m}x{k}x{n} r{r}", m, (k, n), r) for m, k, n, r in sizes)
        yield Target("reduction", "reduction", name, "lora", launches.reduction, chosen)
    for name, width, rank in (("16", 8192, 16), ("64", 4096, 64), ("128", 4096, 128)):
        chosen = (SumCase(f"16384x{width} r{rank}", 16384, (width, width), rank),)
        table = "adapter reduction"
        yield Target("reduction", table, name, "adapter", launches.reduction, chosen)


def targets(methods: tuple[str, ...] = METHODS, only: str = "") -> list[Target]:
    """Return what there is to tune of some methods, what is worth most first.

    Args:
        methods: of ``METHODS``.
        only: a part of a target's place, such as "key 128".
    """
    made = {
        "prefix": _prefix_targets, "lora": _lora_targets, "adapter": _adapter_targets,
        "reduction": _reduction_targets,
    }  # fmt: skip
    # The first entries of every method before the later ones of any.
    columns = itertools.zip_longest(*([*made[method]()] for method in methods))
    found = [each for column in columns for each in column if each is not None]
    return [each for each in found if only in str(each)]


def targets_of(family: str, methods: Sequence[str], only: str) -> list[Target]:
    """Return the targets that a family's tables have an entry of; interpreted: all.

    Raises:
        ValueError: there is none, with the places of those that there are.
    """
    known = [
        target
        for target in targets(tuple(methods))
        if family == tiles.INTERPRETED or present(target, family) is not None
    ]
    found = [target for target in known if only in str(target)]
    if not found:
        raise ValueError(f"--only {only!r}: there are {', '.join(map(str, known)) or 'none'}")
    return found


def present(target: Target, family: str) -> Any:
    """Return the tile that the tables have for an entry, LoRA's by TMA where they name one.

    None: they have no such entry.
    """
    name = target.name
    if family == tiles.INTERPRETED:
        return None
    if target.table == "lora":
        if family in lora_tables.TMA and lora_tiles.tma_from(family, name) is not None:
            return lora_tiles.table_tile(family, WIDTH, f"tma {name}")
        return lora_tiles.table_tile(family, WIDTH, name)
    if target.table == "prefix":
        launch, size, *dropout = name.split()
        by_tma = None if dropout else prefix_tiles.tma_entry(family, launch, int(size))
        pointers = prefix_tiles.family_tile(WIDTH, family, launch, int(size), bool(dropout))
        return by_tma or pointers
    if target.table == "adapter":
        return adapter_tiles.family_tile(family, WIDTH, *_adapter_key(name))
    table = tiles.family_reduction_tiles(family)
    if target.table != "reduction":
        table = adapter_tiles.reduction_tiles(family, WIDTH)
    return table.get(int(name))


def _adapter_key(name: str) -> tuple[str, str, int]:
    shape_class, direction, block = name.split()
    return shape_class, direction, int(block)


def candidates(target: Target, family: str) -> list[Candidate]:
    """Return the tiles that could serve an entry, those most like the present one first."""
    key = (family, target.table, WIDTH, target.name)
    if family == tiles.INTERPRETED:
        return _interpreted(target, key)
    now = present(target, family)
    found = []
    for tile in _grid(target, family):
        name = target.name
        variant = None
        if isinstance(tile, LoRATile):
            variant = tile.variant
            name = ("tma " if variant == "ticket_tma" else "") + name
        elif isinstance(tile, PrefixTile):
            variant = "fused" if tile.tma else "pointers"
            name = ("tma " if tile.tma else "") + name
        if tile != now and tile_file.problem_of(family, target.table, WIDTH, name, tile) is None:
            found.append(Candidate((*key[:3], name), tile, variant))
    return sorted(found, key=lambda each: _distance(each.tile, now))


def _distance(tile: Any, other: Any) -> float:
    """Return how many doublings lie between two tiles; another variant counts as one."""
    total = 0.0
    for name, value in vars(tile).items():
        if isinstance(value, bool) or name == "registers":
            total += value != getattr(other, name)
        elif isinstance(value, int):
            total += abs(math.log2(value / getattr(other, name)))
        else:
            total += value != getattr(other, name)
    return total


def _grid(target: Target, family: str) -> Iterator[Any]:
    # Registers of a thread for sums: with fewer than 16 tensor cores idle, above 128 it spills.
    def fits(sums: int, warps: int) -> bool:
        return 16 <= sums // (32 * warps) <= (256 if family == "sm_100" else 128)

    if target.table == "lora":
        rows = (16,) if target.name.startswith("decode") else (64, 128, 256)
        variants = ["recompute"] if target.name.startswith("decode") else ["ticket"]
        if family in lora_tables.TMA and f"tma {target.name}" in tile_file.NAMES["lora"]:
            variants.append("ticket_tma")
        sizes = itertools.product(
            variants, rows, (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
        )
        for variant, m, n, k, warps, stages in sizes:
            if m == 16 and n <= 128 or m > 16 and n > 32 and fits(m * n, warps):
                yield LoRATile(variant, m, n, k, warps, stages)
    elif target.table == "prefix":
        launch, size = target.name.split()[:2]
        rows = (16, 32, 64, 128)
        for m, n, warps, stages in itertools.product(rows, rows, (4, 8), (1, 2, 3)):
            held = 2 * n * int(size) if launch in ("key", "prefix") else m * int(size)
            if fits(held, warps):
                yield PrefixTile(m, n, warps, stages)
                if family in lora_tables.TMA and f"tma {target.name}" in tile_file.NAMES["prefix"]:
                    yield PrefixTile(m, n, warps, stages, True)
                    yield PrefixTile(m, n, warps, stages, True, 168)
    elif target.table == "adapter":
        _, _, block = _adapter_key(target.name)
        for m, d, warps, stages in itertools.product(
            (16, 32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4)
        ):
            if 8 <= m * max(block, d) // (32 * warps) <= 128:
                yield AdapterTile("fused", m, d, warps, stages, ahead=family == "sm_90")
    else:
        sums = family == "sm_90"
        for m, c, warps, stages in itertools.product(
            (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
        ):
            if 4 <= c * int(target.name) // (32 * warps) <= 128:
                yield ReductionTile(m, c, int(target.name), warps, stages, product_sums=sums)


def _interpreted(target: Target, key: Key) -> list[Candidate]:
    """Return two small tiles: they prove that the code runs."""
    if target.table == "lora":
        tile: Any = LoRATile("ticket", 16, 32, 32, 4, 1)
        tma = LoRATile("ticket_tma", 32, 32, 32, 4, 1)
        by_tma = Candidate((*key[:3], f"tma {target.name}"), tma, "ticket_tma")
        named = f"tma {target.name}" in tile_file.NAMES["lora"]
        return [Candidate(key, tile, "ticket"), *([by_tma] if named else [])]
    if target.table == "prefix":
        return [Candidate(key, PrefixTile(32, 16, 4, 1)), Candidate(key, PrefixTile(16, 32, 4, 1))]
    if target.table == "adapter":
        # So that a few tokens are many.
        few = ((key[0], "limits", "few_tokens", "adapter"), 0)
        return [Candidate(key, AdapterTile("fused", 16, 32, 4, 1), beside=(few,))]
    rank = int(target.name)
    return [Candidate(key, ReductionTile(16, 32, rank, 4, 1))]
