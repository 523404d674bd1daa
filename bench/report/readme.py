"""The tables of a GPU's README, from the JSON files beside it: no figure in them is typed by hand.

Each stands between ``<!-- rows.json -->`` or ``<!-- training.json -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.method import DIRECTIONS, FORWARD, MAIN, OURS, VARIANTS, Method
from bench.methods import METHODS
from bench.rows import FAILED, NOT_RUN, TIMED
from bench.training import APART, CASES, COMPILED, EAGER
from bench.training import OURS as ACCELERATED

END = "<!-- end -->"
ALL, ALL_VARIANTS = "all", "all variants"  # the provider of a case that raised as a whole
SLOWER = 1.02  # than a baseline: what repeated runs do not tell apart is left out
_SHORT = {FORWARD: "forward"}  # the other is "both"
Rows = Sequence[Mapping[str, Any]]


def fill(text: str, folder: Path) -> str:
    """Return a README's ``text`` with what stands between its markers made from ``folder``."""
    for name, section in SECTIONS.items():
        begin = f"<!-- {name} -->"
        if begin in text:
            head, rest = text.split(begin, 1)
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            made = section(content["rows"])
            text = f"{head}{begin}\n\n{made}\n\n{END}{rest.split(END, 1)[1]}"
    return text


def rows_section(rows: Rows) -> str:
    """Return a table for each method, and where ours is slower than another's."""
    parts = []
    for name, method in METHODS.items():
        mine = [row for row in rows if row["op"] == name]
        if mine:
            parts += [_times(method, mine), *_variants(method, mine)]
    parts.append(_slower(rows))
    return "\n\n".join(filter(None, parts))


def _table(header: Sequence[str], left: int, body: Sequence[Sequence[str]]) -> str:
    """Return a table whose first ``left`` columns stand to the left."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body])


def _find(rows: Rows, case: str, direction: str, provider: str) -> Mapping[str, Any] | None:
    key = (case, direction, provider)
    return next(
        (r for r in rows if (r["case"]["name"], r["direction"], r["provider"]) == key), None
    )


def _variant_names(method: Method) -> list[str]:
    """Return the variants' names without the baselines beside them."""
    main = {each.name for each in method.gpu[MAIN]}
    return [each.name for each in method.gpu.get(VARIANTS, ()) if each.name not in main]


def _providers(method: Method, rows: Rows) -> list[str]:
    """Return who was measured or failed, in the order of the report, ours last."""
    known = [each.name for each in method.gpu[MAIN]]
    apart = {*_variant_names(method), ALL, ALL_VARIANTS}
    ran = dict.fromkeys(row["provider"] for row in rows if row["status"] != NOT_RUN)
    found = [name for name in ran if name not in apart]
    order = [name for name in known if name in found and name != OURS]
    order += [name for name in found if name not in known]
    return [*order, OURS]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["status"] != TIMED:
        return "failed" if row["status"] == FAILED else "-"
    return f"{row['timing']['min_ms']:.3f}"


def _times(method: Method, rows: Rows) -> str:
    providers = _providers(method, rows)
    columns = [(each, name) for each in DIRECTIONS for name in providers]
    header = ["case", *(f"{name}, {_SHORT.get(each, 'both')}" for each, name in columns), "commit"]
    body = []
    for case in dict.fromkeys(row["case"]["name"] for row in rows):
        ours = _find(rows, case, FORWARD, OURS)
        whole = _find(rows, case, FORWARD, ALL)
        cells = [_cell(whole or _find(rows, case, each, name)) for each, name in columns]
        body.append([case, *cells, str((whole or ours or {"commit": "-"})["commit"])])
    return _table(header, 1, body)


def _variants(method: Method, rows: Rows) -> list[str]:
    """Return a table of the kernel variants, where they were measured."""
    names = _variant_names(method)
    cases = dict.fromkeys(row["case"]["name"] for row in rows if row["provider"] in names)
    if not cases:
        return []
    columns = [(each, name) for each in DIRECTIONS for name in names]
    header = ["variant", *(f"{n.split(':')[-1]}, {_SHORT.get(e, 'both')}" for e, n in columns)]
    body = [[case, *(_cell(_find(rows, case, *column)) for column in columns)] for case in cases]
    return [_table(header, 1, body)]


def _slower(rows: Rows) -> str:
    """Return where ours takes longer than another form of the same, which a frozen layer is not."""
    lines = []
    for row in (row for row in rows if row["provider"] == OURS and row["status"] == TIMED):
        method, case = METHODS[row["op"]], row["case"]["name"]
        others = [n for n in _providers(method, rows) if n not in (OURS, method.frozen)]
        for name in others:
            other = _find(rows, case, row["direction"], name)
            if other is None or other["status"] != TIMED:
                continue
            ratio = row["timing"]["min_ms"] / other["timing"]["min_ms"]
            if ratio > SLOWER:
                lines.append(f"- {case}, {row['direction']}: {ratio:.2f} of {name}")
    head = "Slower than a baseline, by more than 2%:\n\n"
    return head + "\n".join(lines) if lines else "Nowhere slower than a baseline by more than 2%."


def training_section(rows: Rows) -> str:
    """Return a line for each provider of each case, beside peft's own."""
    cases = [case.name for case in CASES]
    providers = [EAGER, COMPILED, ACCELERATED, APART]
    body = []
    for case in dict.fromkeys([*cases, *(row["case"] for row in rows)]):
        mine = {row["provider"]: row for row in rows if row["case"] == case}
        base = mine.get(EAGER)
        for name in (name for name in dict.fromkeys([*providers, *mine]) if name in mine):
            row = mine[name]
            if row["step_ms"] is None:
                body.append([case, name, row["note"], "-", "-", "-", str(row["commit"])])
                continue
            faster = f"{base['step_ms'] / row['step_ms']:.2f}" if base and base["step_ms"] else "-"
            peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            times = [f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.0f}"]
            body.append([case, name, *times, faster, peak, str(row["commit"])])
    header = ["model, batch, tokens, rank", "runs as", "ms", "tokens/s", "x peft", "GiB", "commit"]
    return _table(header, 2, body)


SECTIONS: dict[str, Callable[[Rows], str]] = {
    "rows.json": rows_section,
    "training.json": training_section,
}
