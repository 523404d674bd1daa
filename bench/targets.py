"""The figures this project set itself, and whether a run reached them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.method import OURS, Target
from bench.methods import METHODS
from bench.rows import FAILED, TIMED, Row


@dataclass(frozen=True)
class Figure:
    """One target and what a run gave.

    Attributes:
        target: what is asked.
        limit: the value may be at most this, or, ``at_least``, not be below it.
        value: the worst value of the cases (or their geometric mean), None if not measured.
        reached: None if not measured.
        detail: the case of that value, or why there is none.
        op: the method it is asked of.
        at_least: more is better.
    """

    target: str
    limit: float
    value: float | None
    reached: bool | None
    detail: str
    op: str = "lora"
    at_least: bool = False


def figures(rows: Sequence[Row], *, suites: Sequence[str] | None = None) -> list[Figure]:
    """Return every target of the methods that ``rows`` are of, with the value they give it.

    Args:
        rows: what was measured.
        suites: whose targets; None: all.
    """
    ops = {row.case.op for row in rows}
    return [
        _figure(target, name, rows)
        for name, method in METHODS.items()
        if name in ops
        for target in method.targets
        if suites is None or target.suite in suites
    ]


def _figure(target: Target, op: str, rows: Sequence[Row]) -> Figure:
    """Return what our rows give a target; a row that failed is worse than any value."""

    def figure(value: float | None, reached: bool | None, detail: str) -> Figure:
        return Figure(target.label, target.limit, value, reached, detail, op, target.at_least)

    ours = _ours(rows, op, target)
    broken = [row for row in ours if row.status == FAILED]
    if broken:
        return figure(None, False, f"{broken[0].case.name}: {broken[0].note}")
    if target.mean_over is not None:
        ratios = [ratio for ratio, _ in _over(ours, rows, target.mean_over)]
        value, detail = geometric_mean(ratios) if ratios else None, f"{len(ratios)} cases"
    else:
        value, detail = _worst(target, ours, rows)
    if value is None:
        return figure(None, None, "not measured")
    reached = value >= target.limit if target.at_least else value <= target.limit
    return figure(value, reached, detail)


def _ours(rows: Sequence[Row], op: str, target: Target) -> list[Row]:
    """Return our rows that a target is about, and those of cases that broke altogether."""
    return [
        row
        for row in rows
        if (row.case.op, row.case.suite) == (op, target.suite)
        and target.chosen(row.case)
        and (row.provider == "all" or (row.provider, row.direction) == (OURS, target.direction))
    ]


def _worst(target: Target, ours: Sequence[Row], rows: Sequence[Row]) -> tuple[float | None, str]:
    if target.over is not None:
        pairs = [(1.0 / ratio, row) for ratio, row in _over(ours, rows, target.over)]
    else:
        assert target.value is not None
        pairs = [(value, row) for row in ours if (value := target.value(row)) is not None]
    if not pairs:
        return None, ""
    worst = min if target.at_least else max
    value, row = worst(pairs, key=lambda pair: pair[0])
    base = row.over if target.over is None else None  # the label names the other
    over = f", over {base}" if base not in (None, "eager") else ""
    return value, f"worst of {len(pairs)}: {row.case.name}{over}"


def _over(ours: Sequence[Row], rows: Sequence[Row], provider: str) -> list[tuple[float, Row]]:
    """Return our times over a provider's and our rows, of every case that both have."""
    ratios = []
    for mine in ours:
        for row in rows:
            same = (row.case.name, row.direction) == (mine.case.name, mine.direction)
            if same and row.provider == provider and mine.status == row.status == TIMED:
                assert mine.timing and row.timing
                ratios.append((mine.timing.min_ms / row.timing.min_ms, mine))
    return ratios


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of at least one positive value."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
