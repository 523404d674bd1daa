"""The short tables of the GPU report: of a method's times, and of how all stages ended."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.method import BOTH, DIRECTIONS, FORWARD, GPU, MAIN, MIB, OURS, VARIANTS, Method
from bench.methods import METHODS
from bench.rows import FAILED, TIMED, Row, row_of
from bench.tables import figure_table, ms, short
from bench.targets import figures, geometric_mean
from bench.third_party import PEERS

SHOWN = 8  # of failures, of each kind
PLAN_WIDTH = 60


def timing_text(content: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the table of a method's stage, and whether all gates passed and nothing crashed."""
    method = METHODS[content["stage"]]
    rows = {group: _rows(content, group) for group in (MAIN, VARIANTS)}
    failed = [row for group in rows.values() for row in group if row.status == FAILED]
    lines = _times(method, rows[MAIN]) if rows[MAIN] else []
    lines += _variants(rows[VARIANTS])
    gpu_rows = [row for row in rows[MAIN] if row.case.suite == GPU]
    if gpu_rows:
        lines += figure_table(figures(gpu_rows, suites=[GPU])).splitlines()
    lines += limited("GATE FAILED", (f"{_where(row)}: {row.note}" for row in failed))
    lines += limited("CRASHED", (f"{k}: {v}" for k, v in content["crashed"].items()))
    if content["not_run"]:
        lines.append("not run, out of time: " + "; ".join(content["not_run"])[:300])
    # A peer whose numbers are wrong gets no speed; that is no fault of ours.
    own = [row for row in failed if row.provider not in {peer.name for peer in PEERS}]
    return "\n".join(lines), not own and not content["crashed"]


def ending(stages: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], dry: bool) -> str:
    """Return a line for each stage that ran, and what it ran on."""
    lines = ["", "DRY RUN: no GPU, Triton interpreted; its times say nothing" if dry else ""]
    for each in stages:
        verdict = "ok" if each["ok"] else "NOT OK"
        taken = f"{each['seconds']:.0f} s" if "seconds" in each else ""
        lines.append(f"{each['stage']:<10}{verdict:<8}{taken:>6}  {each['ended']}"[:200])
    commit = (machine["commit"] or "unknown")[:10] + (" (dirty)" if machine["dirty"] else "")
    where = f"{machine['gpu']}, driver {machine['driver']}" if "gpu" in machine else machine["cpu"]
    lines.append(f"{where}; torch {machine['torch']}, triton {machine['triton']}, commit {commit}")
    return "\n".join(lines)


def predicted_ms(row: Row) -> float | None:
    """Return the time that the model of the machine predicts, None without such a model."""
    if importlib.util.find_spec("bench.model") is None:
        return None
    value: float | None = importlib.import_module("bench.model").predicted_ms(row)
    return value


def _rows(content: Mapping[str, Any], group: str) -> list[Row]:
    chosen = [row for row in content["rows"] if row["item"].startswith(f"{group} ")]
    return [row_of(row) for row in chosen]


def _where(row: Row) -> str:
    return f"{row.case.name}, {row.direction}, {row.provider}"


def limited(title: str, entries: Iterable[str], width: int = 160) -> list[str]:
    """Return the first entries, a line each, and how many more there are."""
    texts = [f"{title}  {entry}"[:width] for entry in entries]
    more = [f"{title}  and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return texts[:SHOWN] + more


def _times(method: Method, rows: Sequence[Row]) -> list[str]:
    """Return a line per case and direction, and the geometric means of the ratios."""
    timed = {row.provider for row in rows if row.timing is not None}
    bases = [each.name for each in method.gpu[MAIN] if each.name != OURS and each.name in timed]
    widths = {base: max(11, len(base) + 4) for base in bases}
    header = "".join(f"{f'x {base}':>{widths[base]}}" for base in bases)
    width = max([27, *(len(row.case.name) + 1 for row in rows)])
    lines = [
        f"{'case':<{width}}{'':<9}{'fused ms':>9}{'model':>9}{'host ms':>9}{'roofline':>9}"
        f"{header}{'launches':>9}{'saved MiB':>10}  runs as"
    ]
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in (row for row in rows if row.provider == OURS):
        direction = "fwd" if row.direction == FORWARD else "fwd+bwd"
        if row.status != TIMED or row.timing is None:
            lines.append(f"{row.case.name:<{width}}{direction:<9}{row.status.upper()}")
            continue
        cells = ""
        for base in bases:
            other = _find(rows, row.case.name, row.direction, base)
            if other is None or other.timing is None:
                cells += f"{'-':>{widths[base]}}"
                continue
            value = row.timing.min_ms / other.timing.min_ms
            ratios.setdefault((row.direction, base), []).append(value)
            cells += f"{value:>{widths[base]}.3f}"
        launches = "-" if row.launches is None else str(row.launches)
        saved = "-" if row.saved_bytes is None else f"{row.saved_bytes / MIB:.3f}"
        lines.append(
            f"{row.case.name:<{width}}{direction:<9}{ms(row.timing.min_ms):>9}{_more(row)}{cells}"
            f"{launches:>9}{saved:>10}  {_plan(row)[:PLAN_WIDTH]}"
        )
    for direction in DIRECTIONS:
        found = [(base, ratios.get((direction, base))) for base in bases]
        cells = "".join(
            f"{f'{geometric_mean(each):.3f}' if each else '-':>{widths[base]}}"
            for base, each in found
        )
        name = "fwd" if direction == FORWARD else "fwd+bwd"
        lines.append(f"{'geometric mean':<{width}}{name:<9}{'':>36}{cells}")
    return lines


def _more(row: Row) -> str:
    """Return the predicted time, the host's, and the share of the roofline."""
    predicted = predicted_ms(row)
    model = "-" if predicted is None else ms(predicted)
    share = "-" if row.roofline is None else f"{row.roofline:.0%}"
    return f"{model:>9}{short(row.wall):>9}{share:>9}"


def _find(rows: Sequence[Row], case: str, direction: str, provider: str) -> Row | None:
    key = (case, direction, provider)
    return next((r for r in rows if (r.case.name, r.direction, r.provider) == key), None)


def _plan(row: Row) -> str:
    """Return the tile of the direction's own launch."""
    parts = (row.plan or "").split("; backward ")
    return parts[-1] if row.direction == BOTH else parts[0].removeprefix("triton: forward ")


def _variants(rows: Sequence[Row]) -> list[str]:
    """Return a line per case: every kernel variant's time, forward and both."""
    mine = [row for row in rows if row.provider.startswith("triton")]
    lines = [f"{'variants, ms: fwd / fwd+bwd':<36}"] if mine else []
    for case in dict.fromkeys(row.case.name for row in mine):
        cells = []
        for provider in dict.fromkeys(row.provider for row in mine):
            found = [_find(mine, case, direction, provider) for direction in DIRECTIONS]
            both = " / ".join(short(row.timing if row else None) for row in found)
            cells.append(f"{provider.removeprefix('triton:')} {both}")
        lines.append(f"{case:<27}" + "   ".join(cells))
    return lines
