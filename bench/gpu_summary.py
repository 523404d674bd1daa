"""The short table at the end of the GPU report, from its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.method import BOTH, DIRECTIONS, FORWARD, GPU, MAIN, MIB, OURS, VARIANTS, Method
from bench.methods import METHODS
from bench.rows import FAILED, TIMED, Row, row_of
from bench.tables import figure_table, ms, short
from bench.targets import figures, geometric_mean
from bench.training import Result, table

SHOWN = 8  # of failures, of each kind


def summary(content: dict[str, Any]) -> tuple[str, bool]:
    """Return the table, and whether all tests and gates passed.

    At most 60 lines for LoRA, and 30 for each further method.
    """
    rows = {MAIN: _rows(content, MAIN), VARIANTS: _rows(content, VARIANTS)}
    failed = [row for group in rows.values() for row in group if row.status == FAILED]
    lines = ["", "DRY RUN: no GPU, Triton interpreted; its times say nothing"]
    if not content["dry_run"]:
        lines = [""]
    for name, method in METHODS.items():
        mine = [row for row in rows[MAIN] if row.case.op == name]
        lines += _times(method, mine) if mine else []
        lines += _variants([row for row in rows[VARIANTS] if row.case.op == name])
    gpu_rows = [row for row in rows[MAIN] if row.case.suite == GPU]
    if gpu_rows:
        lines += figure_table(figures(gpu_rows, suites=[GPU])).splitlines()
    training = content.get("training")
    if training:
        lines += table([Result(**row) for row in training["rows"]]).splitlines()
        lines += [] if training["ok"] else [f"training: {training['ended']}"]
    lines += _limited("GATE FAILED", (f"{_where(row)}: {row.note}" for row in failed))
    lines += _limited("CRASHED", (f"{k}: {v}" for k, v in content["crashed"].items()))
    lines += _limited("TEST FAILED", content["tests"]["failed"])
    if content["not_run"]:
        lines.append("not run, out of time: " + "; ".join(content["not_run"])[:300])
    lines += _ending(content, len(failed))
    ok = content["tests"]["ok"] and not failed and not content["crashed"]
    ok = ok and (not training or training["ok"])
    return "\n".join(lines), ok


def _rows(content: dict[str, Any], group: str) -> list[Row]:
    chosen = [row for row in content["rows"] if row["item"].startswith(f"{group} ")]
    return [row_of({k: v for k, v in row.items() if k != "item"}) for row in chosen]


def _where(row: Row) -> str:
    return f"{row.case.name}, {row.direction}, {row.provider}"


def _limited(title: str, entries: Iterable[str]) -> list[str]:
    texts = [f"{title}  {entry}"[:160] for entry in entries]
    more = [f"{title}  and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return texts[:SHOWN] + more


def _times(method: Method, rows: Sequence[Row]) -> list[str]:
    """Return a line per case and direction, and the geometric means of the ratios."""
    bases = [each.name for each in method.gpu[MAIN] if each.name != OURS]
    header = "".join(f"{f'x {base}':>11}" for base in bases)
    width = max([27, *(len(row.case.name) + 1 for row in rows)])
    lines = [
        f"{'case':<{width}}{'':<9}{'fused ms':>9}{header}{'launches':>9}{'saved MiB':>10}  runs as"
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
                cells += f"{'-':>11}"
                continue
            value = row.timing.min_ms / other.timing.min_ms
            ratios.setdefault((row.direction, base), []).append(value)
            cells += f"{value:>11.3f}"
        launches = "-" if row.launches is None else str(row.launches)
        saved = "-" if row.saved_bytes is None else f"{row.saved_bytes / MIB:.3f}"
        lines.append(
            f"{row.case.name:<{width}}{direction:<9}{ms(row.timing.min_ms):>9}{cells}"
            f"{launches:>9}{saved:>10}  {_plan(row)}"
        )
    for direction in DIRECTIONS:
        found = [ratios.get((direction, base)) for base in bases]
        cells = "".join(
            f"{geometric_mean(each):>11.3f}" if each else f"{'-':>11}" for each in found
        )
        name = "fwd" if direction == FORWARD else "fwd+bwd"
        lines.append(f"{'geometric mean':<{width}}{name:<9}{'':>9}{cells}")
    return lines


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


def _ending(content: dict[str, Any], gates_failed: int) -> list[str]:
    tests, machine = content["tests"], content["machine"]
    counts = ", ".join(f"{number} {name}" for name, number in sorted(tests["counts"].items()))
    commit = (machine["commit"] or "unknown")[:10] + (" (dirty)" if machine["dirty"] else "")
    where = f"{machine['gpu']}, driver {machine['driver']}" if "gpu" in machine else machine["cpu"]
    verdict = "ok" if tests["ok"] else "NOT OK"
    return [
        f"tests marked gpu: {verdict}: {counts or 'none ran'} ({tests['ended']}); "
        f"gates failed: {gates_failed}; build: {content['build']['ended']}",
        f"{where}; torch {machine['torch']}, triton {machine['triton']}, commit {commit}",
    ]
