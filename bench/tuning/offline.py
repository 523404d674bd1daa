"""What is known of a tile without its GPU: compiled for it, and counted.

Kernels are cross-compiled as ``tests.compile`` does, each in the two forms that need most: what
spills there is no tile of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bench.machine import kernels
from bench.machine.gpus import Gpu, find
from bench.machine.kernels import Kernel
from bench.model import USES, predict_kernel
from bench.tuning.candidates import WIDTH, Candidate, Target
from bench.tuning.launches import SumCase

# The GPU of each family that waves are counted for.
OF_FAMILY = {
    "sm_80": "A100", "sm_86": "RTX 3090", "sm_89": "RTX 4090", "sm_90": "H200",
    "sm_100": "B200", "sm_120": "RTX 5090",
}  # fmt: skip
# Of a multiprocessor, from the CUDA programming guide: shared memory in KiB, and warps.
SHARED_KIB = {
    "sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100,
}  # fmt: skip
WARPS = {"sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90": 64, "sm_100": 64, "sm_120": 48}
REGISTERS = 65536
L2_BYTES_A_CLOCK = 64  # that a multiprocessor takes


@dataclass(frozen=True)
class Known:
    """What is known of a tile.

    Attributes:
        tile: as a file spells it.
        problems: what keeps it from the tables.
        registers: of a thread; 0 where nothing was compiled.
        spills: instructions that move registers to memory and back.
        shared_kib: shared memory of a program.
        products: tensor-core instructions of the kernel.
        blocks: programs that a multiprocessor holds at a time.
        limit: what limits them: "registers", "shared memory" or "warps".
        waves: of programs, at each case.
        tail: share of the last wave's places that all programs fill, at the worst case.
        tile_bytes: what a step of the loop loads.
        intensity: operations for each byte that a step loads.
        ms: predicted, at each case.
        score: geometric mean of those, in the tile's favour or against it what the model does not
            know; the least is best.
    """

    tile: str
    problems: tuple[str, ...]
    registers: int
    spills: int
    shared_kib: float
    products: int
    blocks: int
    limit: str
    waves: tuple[float, ...]
    tail: float
    tile_bytes: int
    intensity: float
    ms: tuple[float, ...]
    score: float

    def reasons(self, family: str) -> str:
        """Return it in words."""
        compiled = (
            f"{self.registers} registers, {self.spills or 'no'} spills, {self.shared_kib:.0f} KiB "
            f"of {SHARED_KIB[family] - 1}, {self.products} tensor-core instructions"
            if self.registers
            else "not compiled"
        )
        waves = ", ".join(f"{wave:.1f}" for wave in self.waves)
        times = ", ".join(f"{ms:.3f}" for ms in self.ms)
        return (
            f"{compiled}; {self.blocks} programs a multiprocessor by {self.limit}; waves {waves}, "
            f"{self.tail:.0%} full; {self.tile_bytes / 1024:.0f} KiB a step, "
            f"{self.intensity:.0f} operations a byte; predicted {times} ms, score {self.score:.3f}"
        )


def known(target: Target, candidate: Candidate, family: str, *, compiled: bool = True) -> Known:
    """Return what is known of a candidate; without ``compiled``, registers are guessed."""
    tile = candidate.tile
    gpu = find(OF_FAMILY[family])
    assert gpu is not None
    reports = [*_reports(target, tile, family)] if compiled else []
    problems = dict.fromkeys(problem for _, found in reports for problem in found)
    registers = max((report.registers for report, _ in reports), default=0)
    shared = max(
        (report.shared_kib for report, _ in reports), default=_guessed_kib(target, tile, gpu)
    )
    blocks, limit = _blocks(
        family, registers or min(255, _guessed_registers(target, tile)), shared, tile
    )
    works = [_work(target, case, candidate, gpu) for case in target.cases]
    places = blocks * gpu.multiprocessors
    waves = tuple(each.tiles / places for each in works)
    tile_bytes, intensity = _step(target, tile)
    ms = tuple(predict_kernel(_placed(each, blocks), gpu, WIDTH).ms for each in works)
    score = math.exp(sum(map(math.log, ms)) / len(ms))
    score *= _penalty(target, tile, gpu, blocks, works, tile_bytes, intensity, registers)
    return Known(
        str(candidate), tuple(problems), registers,
        max((report.spills for report, _ in reports), default=0), shared,
        max((report.matrix_instructions for report, _ in reports), default=0), blocks, limit,
        waves, min((wave / math.ceil(wave) for wave in waves), default=1.0), tile_bytes, intensity,
        ms, score,
    )  # fmt: skip


# What the model does not know of a tile, of which the score is made; the constants are those that
# rank the tiles timed on an H200 best: tests/bench/test_tiles.py says how well.
LATENCY_US = 3.0  # of a load: what it brings should be on the way that long before
WAITING = 0.3  # how much shows of what is not: its exponent
STARVED = 0.6  # likewise, of what tiles are smaller than L2 and shared memory would like them
SCORES_US = 0.3  # of a step of attention, beside its products
SPILLED = 4.0  # exponent of the registers beyond 255 that a tile is guessed to need
BASE = 80  # registers of a thread beside sums, guessed
ALONE = 1.2  # one program a multiprocessor, of a kernel that overlaps little
WITHOUT_WGMMA = 0.62  # of Hopper's rate that products of too few rows for its instruction reach


def _penalty(
    target: Target, tile: Any, gpu: Gpu, blocks: int, works: list[Kernel], tile_bytes: int,
    intensity: float, registers: int,
) -> float:  # fmt: skip
    """Return by how much a tile is expected to be slower than its work says."""
    a_clock = gpu.tflops[WIDTH] * 1e3 / (gpu.multiprocessors * gpu.ghz)  # operations
    # L2 and shared memory set the pace of small tiles: of less than twice what L2 alone asks for.
    starved = max(1.0, 2 * 0.66 * a_clock / L2_BYTES_A_CLOCK / intensity) ** STARVED
    rows = tile.block_m
    if target.table == "prefix" and target.name.startswith(("key", "prefix")):
        rows = tile.block_n
    elif target.table.endswith("reduction"):
        rows = tile.block_c
    matrix = (
        1 / WITHOUT_WGMMA if gpu.family == "sm_90" and rows < 16 * max(4, tile.num_warps) else 1.0
    )
    # Programs that a multiprocessor really has: of few, the rest of its places stays empty.
    present = min([float(blocks), *(each.tiles / gpu.multiprocessors for each in works)])
    busy = max(0.5, present)
    step_us = tile_bytes * intensity / (0.5 * a_clock * gpu.ghz * 1e3)
    # What is done to scores between two products is hidden by another program's products.
    between = 1 + SCORES_US / (step_us * busy) if target.table == "prefix" else 1.0
    paced = USES[works[0].kind].overlaps  # by products, and not by memory
    a_us = tile_bytes / step_us if paced else gpu.gigabytes_per_s * 1e3 / gpu.multiprocessors
    flying = busy * max(1, tile.num_stages - 1) * tile_bytes
    waiting = max(1.0, LATENCY_US * a_us / flying) ** WAITING
    spilled = max(1.0, _guessed_registers(target, tile) / 255) ** SPILLED if not registers else 1.0
    if not paced:
        # A program's two loops follow one another: another program fills the gap between them.
        alone = ALONE if busy < 1.5 else 1.0
        # Each program of an adapter reads both weights, from L2.
        l2 = gpu.multiprocessors * gpu.ghz * 1e6 * L2_BYTES_A_CLOCK  # a millisecond
        again = 0.0
        if target.table == "adapter":
            streamed = 4 * target.cases[0].features * int(target.name.split()[2])
            again = works[0].tiles * streamed / l2 / predict_kernel(works[0], gpu, WIDTH).ms
        return spilled * waiting * alone * (1 + again)
    return spilled * starved * matrix * between * waiting


def _placed(kernel: Kernel, blocks: int) -> Kernel:
    # A persistent grid has two programs a multiprocessor at most.
    return replace(kernel, resident=min(2, blocks)) if kernel.resident else kernel


def _work(target: Target, case: Any, candidate: Candidate, gpu: Gpu) -> Kernel:
    """Return the launch's work at a case, with the candidate in the tables."""
    family = gpu.family
    # Sums over tokens or rows are split until there are two programs a multiprocessor.
    split = 2 * gpu.multiprocessors
    if isinstance(case, SumCase):
        drawn = case.tokens * case.columns[0] * bool(case.dropout_p)
        made = kernels.reduction(candidate.tile, case.tokens, case.columns, case.rank, 2, drawn)
        programs = sum(math.ceil(each / candidate.tile.block_c) for each in case.columns)
        programs *= math.ceil(case.rank / candidate.tile.block_r)
        return replace(made, tiles=max(split, programs))
    with candidate.forced():
        if target.table == "lora":
            return kernels.lora_product(case, family, target.launch == "backward")
        if target.table == "adapter":
            return kernels.adapter_rows(case, family, target.launch)
        launch, _, dropout = target.launch.partition(" ")
        make = kernels.prefix_rows if launch in ("forward", "query") else kernels.prefix_keys
        made = make(case, family, launch, bool(dropout))
        return replace(made, tiles=max(split, made.tiles)) if launch == "prefix" else made


def _blocks(family: str, registers: int, shared_kib: float, tile: Any) -> tuple[int, str]:
    """Return how many programs a multiprocessor holds, and what limits them."""
    # Registers are given out in eights to a thread, 256 to a warp; a program takes 1 KiB beside.
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * tile.num_warps)
    by_shared = int(SHARED_KIB[family] // (shared_kib + 1))
    by_warps = WARPS[family] // tile.num_warps
    least = min(by_registers, by_shared, by_warps)
    names = {by_warps: "warps", by_shared: "shared memory", by_registers: "registers"}
    return max(1, least), names[least]


def _guessed_registers(target: Target, tile: Any) -> int:
    """Return the registers of its sums and of the rest: above 255 it will spill."""
    if target.table == "lora":
        sums = tile.block_m * tile.block_n
    elif target.table == "prefix":
        launch, size = target.name.split()[:2]
        held = 2 * tile.block_n if launch in ("key", "prefix") else tile.block_m
        # Scores and, backward, their gradient.
        sums = held * int(size) + (1 + (launch != "forward")) * tile.block_m * tile.block_n
    elif target.table == "adapter":
        sums = tile.block_m * max(tile.block_d, int(target.name.split()[2]))
    else:
        sums = tile.block_c * tile.block_r
    return BASE + sums // (32 * tile.num_warps)


def _step(target: Target, tile: Any) -> tuple[int, float]:
    """Return the bytes that a step of the loop loads, and its operations for each of them."""
    if target.table == "lora":
        loaded = 2 * (tile.block_m + tile.block_n) * tile.block_k
        return loaded, 2 * tile.block_m * tile.block_n * tile.block_k / loaded
    if target.table == "prefix":
        launch, size = target.name.split()[:2]
        over_rows = launch in ("key", "prefix")
        loaded = 4 * (tile.block_m if over_rows else tile.block_n) * int(size)
        products = {"forward": 2, "query": 3}.get(launch, 4)
        return loaded, 2 * products * tile.block_m * tile.block_n * int(size) / loaded
    if target.table == "adapter":
        block = int(target.name.split()[2])
        loaded = 2 * (tile.block_m + block) * tile.block_d
        return loaded, 2 * tile.block_m * block * tile.block_d / loaded
    loaded = 2 * tile.block_m * (tile.block_c + tile.block_r)
    return loaded, 2 * tile.block_m * tile.block_c * tile.block_r / loaded


def _guessed_kib(target: Target, tile: Any, gpu: Gpu) -> float:
    # Hopper's products read a stage while the next one is filled.
    stages = tile.num_stages - (gpu.family != "sm_90")
    kept = 0
    if target.table == "prefix":
        launch, size = target.name.split()[:2]
        rows = 2 * tile.block_n if launch in ("key", "prefix") else tile.block_m
        kept = 2 * rows * int(size) * (1 + (launch == "query"))
    return (max(1, stages) * _step(target, tile)[0] + kept) / 1024


def _reports(target: Target, tile: Any, family: str) -> Iterator[tuple[Any, list[str]]]:
    """Yield what the compiler made of the forms that need most, and what is wrong with it."""
    from tests.compile import prefix_sources, sweep

    for kernel, source in _sources(target, tile):
        plain = target.table == "prefix" and prefix_sources.is_plain(source)
        case = sweep.Case(
            "", kernel, source, tile.num_warps, tile.num_stages,
            registers=tile.registers if plain else 0,
        )  # fmt: skip
        report = sweep.compile_case(case, family)
        yield report, report.problems(family, pipelined=tile.num_stages > 1)


def _sources(target: Target, tile: Any) -> Iterator[tuple[str, Any]]:
    from tests.compile import adapter_sources, lora_sources, prefix_sources, reduction_sources

    if target.table == "lora":
        rank = 64 if target.name.endswith("+") else 16
        dropped = target.name.startswith(("dropped", "masked"))
        dropout = (2 if target.launch == "backward" else 1) if dropped else 0
        by_tma = tile.variant == "ticket_tma"
        make = lora_sources.tma_product if by_tma else lora_sources.product
        yield f"_lora_{tile.variant}_kernel", make("bf16", tile, rank, target.launch, dropout)
    elif target.table == "prefix":
        launch, size, *dropout = target.name.split()
        for form in prefix_sources._FORMS[launch][:2]:
            source = prefix_sources.prefix(
                "bf16", tile, int(size), launch, dropout=bool(dropout), **form
            )
            yield prefix_sources.KERNELS[launch], source
    elif target.table == "adapter":
        _, direction, block = target.name.split()
        for options in ({}, {"dropout": True, "scale": 3, "activation": "mish"}):
            source = adapter_sources.adapter("bf16", tile, int(block), direction, **options)  # type: ignore[arg-type]
            yield f"_adapter_{direction}_kernel", source
    elif target.table == "reduction":
        yield "_token_reduction_kernel", reduction_sources.lora("bf16", tile, True, 8)
    else:
        yield "_token_reduction_kernel", reduction_sources.adapter("bf16", tile, True, 8, 3, False)
