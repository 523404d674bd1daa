"""The work of every kernel that a case launches: arithmetic, traffic, programs and their steps.

Sizes are those of the tiles that the tables choose, padding among it: what a tensor core multiplies
and not what was asked for. A kernel's ``kind`` says how well it uses the machine (``bench.model``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from bench.adapter.cases import AdapterCase
from bench.lora.cases import LoRACase
from bench.method import BOTH
from bench.prefix import PrefixCase
from bench.prompt import PromptCase
from peft_kernels.core import adapter_tiles, lora_tiles, overrides, prefix_tiles, tiles
from peft_kernels.core.adapter_tiles import bottleneck_block
from peft_kernels.core.prefix_tiles import PrefixTile
from peft_kernels.core.tiles import ReductionTile

# What a program of attention does beside its loop (rows read, result scaled and written), as if it
# were so many keys more, or rows.
BESIDE = 160


@dataclass(frozen=True)
class Kernel:
    """What one launch does.

    Attributes:
        name: for people.
        kind: of ``bench.model.USES``.
        flops: of tensor cores, padding included.
        bytes: of memory, each tensor as often as it comes from there.
        tiles: what programs work through.
        resident: programs that a multiprocessor holds at a time, 0 where tiles are many and small.
        steps: of a program's loop.
        exponentials: scores whose exponential is taken.
        drawn: elements of dropout masks.
    """

    name: str
    kind: str
    flops: float = 0.0
    bytes: float = 0.0
    tiles: int = 0
    resident: int = 0
    steps: int = 0
    exponentials: float = 0.0
    drawn: float = 0.0


# The launch by which torch draws the seed of a dropout mask.
SEED = Kernel("seed", "small", bytes=8.0)


def _width(case: Any) -> str:
    return tiles.width(case.torch_dtype)


def reduction(
    tile: ReductionTile, tokens: int, columns: tuple[int, int], rank: int, size: int, drawn: float
) -> Kernel:
    """Return the token-split sums of two factors; ``drawn``: elements of a mask."""
    blocks = ceil(rank / tile.block_r)
    padded = blocks * tile.block_r
    read = tokens * sum(columns) * size
    return Kernel(
        "dA, dB, sums", "reduction", flops=2.0 * tokens * sum(columns) * padded, bytes=read,
        drawn=drawn * blocks,
    )  # fmt: skip


def lora_product(case: LoRACase, family: str, backward: bool) -> Kernel:
    """Return the base product and the low-rank one: y, or dx."""
    m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank
    k, n = (n, k) if backward else (k, n)
    plain, dropped = ("backward", "masked") if backward else ("forward", "dropped")
    direction = dropped if case.dropout_p else plain
    width, size = _width(case), case.torch_dtype.itemsize
    aligned = k % 64 == n % 16 == 0
    tile = lora_tiles.chosen(family, width, m, r, direction, aligned, work=m * k * n)
    rows, columns = ceil(m / tile.block_m), ceil(n / tile.block_n)
    block = lora_tiles.rank_block(r)
    ranks = ceil(r / block) * block
    # s is made once for each row of tiles, or, recomputed, in each tile.
    makers = columns if tile.variant == "recompute" else 1
    padded = rows * tile.block_m
    flops = 2.0 * padded * (columns * tile.block_n * (k + ranks) + makers * k * ranks)
    return Kernel(
        f"{'dx' if backward else 'y'}: {tile}", tile.variant, flops,
        bytes=(m * k + n * k + m * n) * size, tiles=rows * columns,
        resident=1 if tile.block_m * tile.block_n > 128 * 128 else 2,
        steps=ceil(k / tile.block_k), drawn=(m * n if backward else m * k) * bool(case.dropout_p),
    )  # fmt: skip


def lora(case: LoRACase, direction: str, family: str) -> Iterator[Kernel]:
    """Yield the launches of ``lora_linear``."""
    if case.dropout_p:
        yield SEED
    yield lora_product(case, family, False)
    if direction == BOTH:
        yield lora_product(case, family, True)
        tables = tiles.family_reduction_tiles(family)
        tile = tables[tiles.reduction_block(tables, case.rank)]
        columns = (case.in_features, case.out_features)
        drawn = case.tokens * case.in_features * bool(case.dropout_p)
        size = case.torch_dtype.itemsize
        yield reduction(tile, case.tokens, columns, case.rank, size, drawn)


def frozen(case: LoRACase, direction: str, family: str) -> Iterator[Kernel]:
    """Yield the library's products of the layer without the method."""
    m, k, n = case.tokens, case.in_features, case.out_features
    moved = (m * k + n * k + m * n) * case.torch_dtype.itemsize
    for name in ("y", "dx")[: 2 if direction == BOTH else 1]:
        yield Kernel(f"{name}: library", "library", 2.0 * m * k * n, moved)


def adapter_rows(case: AdapterCase, family: str, direction: str) -> Kernel:
    """Return both products of an adapter: "forward", or "backward", which is dx."""
    m, d, r = case.tokens, case.features, case.bottleneck
    width, size, block = _width(case), case.torch_dtype.itemsize, bottleneck_block(r)
    shape_class = "few" if m <= adapter_tiles.FEW_TOKENS else "many"
    shape_class = "ragged" if d % 16 or r % 16 else shape_class
    tile = adapter_tiles.family_tile(family, width, shape_class, direction, block)
    name = f"{shape_class} {direction} {block}"
    tile = overrides.entry(family, "adapter", width, name, tile)
    rows = ceil(m / tile.block_m)
    # The input is read for the first product and again for what is added to the second.
    return Kernel(
        f"{'y' if direction == 'forward' else 'dx'}: {tile}", "adapter",
        4.0 * rows * tile.block_m * d * block, bytes=3 * m * d * size, tiles=rows,
        drawn=m * d * bool(case.dropout_p),
    )  # fmt: skip


def adapter(case: AdapterCase, direction: str, family: str) -> Iterator[Kernel]:
    """Yield the launches of ``adapter``."""
    if case.dropout_p:
        yield SEED
    yield adapter_rows(case, family, "forward")
    if direction == BOTH:
        yield adapter_rows(case, family, "backward")
        tables = adapter_tiles.reduction_tiles(family, _width(case))
        sums = tables[tiles.reduction_block(tables, case.bottleneck)]
        columns, size = (case.features, case.features), case.torch_dtype.itemsize
        drawn = case.tokens * case.features * bool(case.dropout_p)
        yield reduction(sums, case.tokens, columns, case.bottleneck, size, drawn)


def _prefix_tile(case: PrefixCase, family: str, launch: str, dropout: bool) -> PrefixTile:
    width = _width(case)
    block = prefix_tiles.head_block(case.head_size)
    if width == "16bit" and not dropout and prefix_tiles.FORCED.current != "pointers":
        by_tma = prefix_tiles.tma_entry(family, launch, case.head_size)
        if by_tma is not None:
            return by_tma
    tile = prefix_tiles.family_tile(width, family, launch, block, dropout)
    name = prefix_tiles.entry_name(launch, case.head_size, dropout)
    own: PrefixTile = overrides.entry(family, "prefix", width, name, tile)
    return own


def prefix_rows(case: PrefixCase, family: str, launch: str, dropout: bool = False) -> Kernel:
    """Return "forward", or "query": programs of query rows that walk over prefix and keys."""
    d = prefix_tiles.head_block(case.head_size)
    tile = _prefix_tile(case, family, launch, dropout)
    group, queries = case.heads // case.kv_heads, case.queries
    fold = group > 1 and 2 * queries <= tile.block_m
    heads = case.kv_heads if fold else case.heads
    blocks = ceil((group if fold else 1) * queries / tile.block_m)
    programs = case.batch * heads * blocks
    # Keys before the first query, and half of those beside the queries.
    seen = case.tokens - queries
    last = (min(queries, (block + 1) * tile.block_m) for block in range(blocks))
    own = sum(ceil((seen + row) / tile.block_n) for row in last)
    steps = own / blocks + ceil(case.length / tile.block_n)
    steps += BESIDE / tile.block_n
    scores = programs * steps * tile.block_m * tile.block_n
    # Scores and out; of the query's gradient dP too.
    products, tensors = (2, 2) if launch == "forward" else (3, 4)
    moved = tensors * case.batch * case.heads * queries * case.head_size
    moved += 2 * case.batch * case.kv_heads * case.tokens * case.head_size
    return Kernel(
        f"{launch}: {tile}", "rows", 2.0 * products * scores * d,
        moved * case.torch_dtype.itemsize, programs, exponentials=scores, drawn=scores * dropout,
    )  # fmt: skip


def prefix_keys(case: PrefixCase, family: str, launch: str, dropout: bool = False) -> Kernel:
    """Return dk and dv of "key" or "prefix": programs of keys that walk over rows."""
    d = prefix_tiles.head_block(case.head_size)
    tile = _prefix_tile(case, family, launch, dropout)
    group, queries = case.heads // case.kv_heads, case.queries
    fold = group > 1 and 2 * queries <= tile.block_m
    rows = ceil(group * queries / tile.block_m) if fold else group * ceil(queries / tile.block_m)
    if launch == "key":
        blocks = ceil(case.tokens / tile.block_n)
        # Of a causal call the rows at and after the keys.
        seen = 1.0 if case.decoding else (blocks + 1) / (2 * blocks)
        programs = case.batch * case.kv_heads * blocks
        steps = programs * (rows * seen + BESIDE / tile.block_m)
    else:
        programs = case.kv_heads * ceil(case.length / tile.block_n)
        steps = programs * (case.batch * rows + BESIDE / tile.block_m)
    scores = steps * tile.block_m * tile.block_n
    moved = 2 * case.batch * case.heads * queries * case.head_size * case.torch_dtype.itemsize
    return Kernel(
        f"{launch}: {tile}", "keys", 8.0 * scores * d, moved, programs, exponentials=scores,
        drawn=scores * dropout,
    )  # fmt: skip


def prefix(case: PrefixCase, direction: str, family: str) -> Iterator[Kernel]:
    """Yield the launches of ``prefix_attention``."""
    yield prefix_rows(case, family, "forward")
    if direction == BOTH:
        yield prefix_rows(case, family, "query")
        yield prefix_keys(case, family, "key")
        yield prefix_keys(case, family, "prefix")


def prompt(case: PromptCase, direction: str, family: str) -> Iterator[Kernel]:
    """Yield the launches of ``prompt_embedding``."""
    b, s, p, d = case.batch, case.tokens, case.length, case.width
    size = case.torch_dtype.itemsize
    moved = b * (2 * s + p) * d * size + 4 * p * d + 8 * (3 * b * s + 2 * b * (s + p))
    yield Kernel("place", "small", bytes=moved)
    if direction == BOTH:
        yield Kernel("gradient", "small", bytes=b * p * d * size + 4 * p * d)


Launches = Callable[[Any, str, str], Iterator[Kernel]]
FUSED: dict[str, Launches] = {
    "lora": lora, "adapter": adapter, "prefix": prefix, "prompt": prompt,
}  # fmt: skip
