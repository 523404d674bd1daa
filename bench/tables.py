"""Text of a run: rows, figures, where the host's time goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.measure import Timing
from bench.method import MIB
from bench.rows import FAILED, TIMED, Row
from bench.targets import Figure

_HEADER = (
    f"{'provider':<18}{'min':>9}{'p20':>9}{'p50':>9}{'p80':>9}"
    f"{'x frozen':>10}{'x eager':>9}{'roofline':>10}{'saved MiB':>11}"
)


def table(rows: Sequence[Row]) -> str:
    """Return rows as text, one block per case and direction; times in ms, ratios of the least."""
    lines = []
    before = None
    for row in rows:
        group = (row.case.name, row.direction)
        if group != before:
            lines += ["", f"{row.case.name}, {row.direction}", f"  {_HEADER}"]
            before = group
        lines.append(f"  {row.provider:<18}{_cells(row)}")
    return "\n".join(lines[1:])


def _cells(row: Row) -> str:
    if row.status == FAILED:
        return f"  FAILED {row.note}"
    if row.status != TIMED or row.timing is None:
        saved = "" if row.saved_bytes is None else f", saved {row.saved_bytes / MIB:.3f} MiB"
        return f"  {row.note}{saved}"
    each = row.timing
    times = "".join(f"{ms(t):>9}" for t in (each.min_ms, each.p20_ms, each.p50_ms, each.p80_ms))
    share = "-" if row.roofline is None else f"{row.roofline:.0%}"
    saved = "-" if row.saved_bytes is None else f"{row.saved_bytes / MIB:.3f}"
    text = f"{times}{ratio(row.ratio_frozen):>10}{ratio(row.ratio_eager):>9}{share:>10}{saved:>11}"
    return text + (f"  {row.launches} launches" if row.launches is not None else "")


def ms(value: float) -> str:
    """Return milliseconds with four digits or so."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    """Return a ratio, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def figure_table(figures: Iterable[Figure]) -> str:
    """Return the targets, the values reached, and yes or no; a heading where the method changes."""
    lines: list[str] = []
    before = None
    for each in figures:
        if each.op != before:
            lines.append(each.op)
            before = each.op
        sign = ">=" if each.at_least else "<="
        answer = "-" if each.reached is None else "yes" if each.reached else "NO"
        lines.append(
            f"  {each.target:<57} {sign} {each.limit:<5g} {ratio(each.value):>7}  {answer:<4}"
            f"{each.detail}"
        )
    return "\n".join(lines)


def profile_table(profiles: dict[str, list[dict[str, float | str]]]) -> str:
    """Return where the host's time goes, a block per call profiled."""
    lines = []
    for name, entries in profiles.items():
        lines.append(f"  {name}")
        for entry in entries:
            lines.append(
                f"    {entry['own_us']:>7.2f} us own {entry['total_us']:>8.2f} us with callees"
                f" {entry['calls']:>6.1f} calls  {entry['function']}"
            )
    return "\n".join(lines)


def short(timing: Timing | None) -> str:
    """Return the least time, or a dash."""
    return "-" if timing is None else ms(timing.min_ms)
