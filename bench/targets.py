"""The figures this project set itself, and whether a run reached them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.baselines import FACTORED, FUSED
from bench.cases import CPU, GPU, HOST, MEMORY, LoRACase
from bench.rows import BOTH, DIRECTIONS, FAILED, FORWARD, TIMED, Row

OURS = FUSED.name
MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """One target and what a run gave.

    Attributes:
        target: what is asked.
        limit: the value may be at most this.
        value: the worst value of the cases (or their geometric mean), None if not measured.
        reached: None if not measured.
        detail: the case of that value, or why there is none.
    """

    target: str
    limit: float
    value: float | None
    reached: bool | None
    detail: str


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return every target with the value that ``rows`` give it."""
    found = []
    for label, limit, chosen in _CPU_LIMITS:
        for direction in DIRECTIONS:
            ours = _ours(rows, CPU, direction, chosen)
            found.append(_worst(f"cpu {label}, {direction}: x frozen", limit, ours, _x_frozen))
    for direction in DIRECTIONS:
        ours = _ours(rows, CPU, direction)
        found.append(_worst(f"cpu, {direction}: x eager", 1.0, ours, _x_eager))
    for direction in DIRECTIONS:
        ours = _ours(rows, HOST, direction)
        found.append(_worst(f"host time at [1, 64], {direction}: x eager", 1.2, ours, _x_eager))
    ours = _ours(rows, MEMORY, FORWARD)
    found.append(_worst("saved for backward beyond x: MiB", 0.5, ours, _saved_mib))
    for direction, limit in ((FORWARD, 1.05), (BOTH, 1.10)):
        ours = _ours(rows, GPU, direction)
        found.append(_worst(f"gpu, {direction}: x frozen", limit, ours, _x_frozen))
    for direction in DIRECTIONS:
        found.append(_against_factored(rows, direction))
    return found


_CPU_LIMITS: tuple[tuple[str, float, Callable[[LoRACase], bool]], ...] = (
    ("fp32 without dropout", 1.05, lambda case: case.dtype == "float32" and not case.dropout_p),
    ("bf16 without dropout", 1.10, lambda case: case.dtype == "bfloat16" and not case.dropout_p),
    ("dropout 0.1", 1.20, lambda case: case.dropout_p > 0),
)


def _ours(
    rows: Sequence[Row],
    suite: str,
    direction: str,
    chosen: Callable[[LoRACase], bool] = lambda case: True,
) -> list[Row]:
    """Return our rows of a suite and direction, and those of cases that broke altogether."""
    return [
        row
        for row in rows
        if row.case.suite == suite and chosen(row.case) and _of(row, OURS, direction)
    ]


def _of(row: Row, provider: str, direction: str) -> bool:
    return row.provider == "all" or (row.provider == provider and row.direction == direction)


def _x_frozen(row: Row) -> float | None:
    return row.ratio_frozen


def _x_eager(row: Row) -> float | None:
    return row.ratio_eager


def _saved_mib(row: Row) -> float | None:
    return None if row.saved_bytes is None else row.saved_bytes / MIB


def _worst(
    target: str, limit: float, rows: Sequence[Row], value_of: Callable[[Row], float | None]
) -> Figure:
    """Return the figure of the largest value; a row that failed is worse than any."""
    broken = [row for row in rows if row.status == FAILED]
    if broken:
        return Figure(target, limit, None, False, f"{broken[0].case.name}: {broken[0].note}")
    pairs = [(value, row.case.name) for row in rows if (value := value_of(row)) is not None]
    if not pairs:
        return Figure(target, limit, None, None, "not measured")
    value, name = max(pairs)
    return Figure(target, limit, value, value <= limit, f"worst of {len(pairs)}: {name}")


def _against_factored(rows: Sequence[Row], direction: str) -> Figure:
    target = f"gpu, {direction}: x factored, geometric mean"
    ours = {row.case.name: row for row in _ours(rows, GPU, direction)}
    broken = [row for row in ours.values() if row.status == FAILED]
    if broken:
        return Figure(target, 1.0, None, False, f"{broken[0].case.name}: {broken[0].note}")
    ratios = []
    for row in rows:
        fused = ours.get(row.case.name)
        mine = row.provider == FACTORED.name and row.direction == direction
        if fused and mine and fused.status == row.status == TIMED and fused.timing and row.timing:
            ratios.append(fused.timing.min_ms / row.timing.min_ms)
    if not ratios:
        return Figure(target, 1.0, None, None, "not measured")
    mean = geometric_mean(ratios)
    return Figure(target, 1.0, mean, mean <= 1.0, f"{len(ratios)} cases")


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of at least one positive value."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
