"""Writes the measured figures into README.md, from a file that ``bench.run`` wrote.

``python -m bench.readme RESULT.json`` replaces what stands between the two markers, from that file
and the committed rows of the GPU; no figure there is typed by hand. A row that was not timed shows
a dash; a method that was not measured shows nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.method import DIRECTIONS, GPU, MIB, OURS, Method
from bench.methods import METHODS
from bench.rows import row_of
from bench.targets import figures

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ON_GPU = ROOT / "bench" / "results" / "h200"
BEGIN, END = "<!-- figures of {source} -->", "<!-- end of figures -->"


def section(source: Path) -> str:
    """Return README's figures from a result file, markers included."""
    content = json.loads(source.read_text(encoding="utf-8"))
    if content["quick"]:
        raise ValueError(f"{source} was measured with --quick: its figures mean nothing")
    begin = BEGIN.format(source=source.resolve().relative_to(ROOT))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for row in content["rows"]:
        rows[row.get("op", "lora")].append(row)
    parts = [_machine(content["machine"], frozen=bool(rows["lora"]))]
    for name, method in METHODS.items():
        if rows[name]:
            shown = _over_frozen if method.frozen else _over_eager
            parts += [shown(method, rows[name]), _words(method, rows[name])]
    parts += [_missed(content["figures"]), on_gpu(ON_GPU)]
    return "\n".join([begin, "", "\n\n".join(filter(None, parts)), "", END])


def _machine(machine: dict[str, Any], *, frozen: bool) -> str:
    commit = machine["commit"][:10] + (", with uncommitted changes" if machine["dirty"] else "")
    over = " over that of the frozen `nn.Linear` (1.00 is the floor), rank 16" if frozen else ""
    return (
        f"Measured on {machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, commit "
        f"{commit}: least time of interleaved runs{over}. Read the columns beside each other, not "
        f"the third digit."
    )


def _timed(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return cases and directions of the suites that a table shows."""
    shown = [row for row in rows if row["case"]["suite"] in ("cpu", "gpu")]
    return list(dict.fromkeys((row["case"]["name"], row["direction"]) for row in shown))


Found = dict[tuple[str, str, str], dict[str, Any]]


def _found(rows: list[dict[str, Any]]) -> Found:
    return {(row["case"]["name"], row["direction"], row["provider"]): row for row in rows}


def table(header: list[str], numbers: int, body: list[list[str]]) -> str:
    """Return a table whose last ``numbers`` columns stand to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    lines = ["|" + "|".join(rule) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join(["| " + " | ".join(header) + " |", *lines])


def _over_frozen(method: Method, rows: list[dict[str, Any]]) -> str:
    """Return times over the frozen layer's, a line a case and direction."""
    found = _found(rows)
    body = [
        [name, direction]
        + [_cell(found.get((name, direction, each)), "ratio_frozen") for each in method.columns]
        for name, direction in _timed(rows)
    ]
    header = [method.title, "direction", *method.columns.values()]
    return table(header, len(method.columns), body) if body else ""


def _over_eager(method: Method, rows: list[dict[str, Any]]) -> str:
    """Return how many times faster than eager each is, a line a case."""
    found = _found(rows)
    base = (
        method.eager[0] if len(method.eager) == 1 else f"the faster of {' and '.join(method.eager)}"
    )
    body = [
        [name.removeprefix(f"{method.name} ")]
        + [
            _cell(found.get((name, direction, each)), "ratio_eager", faster=True)
            for direction in DIRECTIONS
            for each in method.columns
        ]
        for name in dict.fromkeys(name for name, _ in _timed(rows))
    ]
    if not body:
        return ""
    columns = [f"{each}, {way}" for way in DIRECTIONS for each in method.columns.values()]
    said = (
        f"{_sentence(method.name)}: least time of {base} over that of each, "
        "so that above 1 is faster than eager."
    )
    return f"{said}\n\n{table([method.title, *columns], len(columns), body)}"


def _sentence(name: str) -> str:
    """Return a name as the beginning of a sentence, its sizes as they are."""
    return name[:1].upper() + name[1:]


def _cell(row: dict[str, Any] | None, ratio: str, *, faster: bool = False) -> str:
    if row is None or row["status"] != "timed" or row[ratio] is None:
        return "-"
    return f"{1 / row[ratio] if faster else row[ratio]:.2f}"


def _words(method: Method, rows: list[dict[str, Any]]) -> str:
    """Return what stands in no table: host time and bytes saved."""
    lines = []
    for row in rows:
        case = row["case"]
        if row["provider"] != OURS:
            continue
        if case["suite"] == "host":
            lines.append(
                f"- Host time of {case['name'].removeprefix('host ')}, {row['direction']}: "
                f"{_cell(row, 'ratio_eager')} of eager's."
            )
        elif case["suite"] == "memory" and row["saved_bytes"] is not None:
            eager = next(
                other["saved_bytes"]
                for other in rows
                if other["case"] == case and other["provider"] == "eager"
            )
            lines.append(
                f"- {_sentence(case['name'])} for backward beyond x: "
                f"{_saved(method, case, row['saved_bytes'])}; "
                f"eager: {_saved(method, case, eager)}."
            )
    return "\n".join(lines)


def _saved(method: Method, case: dict[str, Any], saved: int) -> str:
    text = f"{saved / MIB:.2f} MiB"
    if method.input_bytes is None:
        return text
    x = method.input_bytes(method.case_type(**case))
    return f"{text}, with x {1 + saved / x:.2f} of x"


def _missed(asked: list[dict[str, Any]]) -> str:
    lines = []
    for each in asked:
        if each["reached"] is False and each["value"] is not None:
            op = each.get("op", "lora")
            lines.append(
                f"- Not reached: {'' if op == 'lora' else f'{op}, '}{each['target']} at "
                f"{'least' if each.get('at_least') else 'most'} {each['limit']:g}, got "
                f"{each['value']:.3f} ({each['detail']})."
            )
    return "\n".join(lines)


def on_gpu(folder: Path) -> str:
    """Return how many times faster than eager the committed rows of a GPU are, a line a case."""
    content = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    machine, found = content["machine"], _found(content["rows"])
    body = []
    for name in dict.fromkeys(row["case"]["name"] for row in content["rows"]):
        ours = [found.get((name, direction, OURS)) for direction in DIRECTIONS]
        if any(row is None or row["timing"] is None for row in ours):
            continue
        cells = [_cell(row, "ratio_eager", faster=True) for row in ours]
        commits = dict.fromkeys(str(row["commit"]) for row in ours if row)
        body.append([name, *cells, ", ".join(commits)])
    said = (
        f"Measured on an {machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}: "
        "least device time of eager (of prompt tuning the faster of eager and peft) over ours, "
        "bfloat16, with the commit of each row. "
        f"[All baselines and what else ran there](bench/results/{folder.name}/README.md)."
    )
    header = ["case", *DIRECTIONS, "commit"]
    rows = [row_of(each) for each in content["rows"]]
    asked = [asdict(each) for each in figures(rows, suites=[GPU])]
    return "\n\n".join(filter(None, [said, table(header, 3, body), _missed(asked)]))


def source_of(text: str) -> Path:
    """Return the result file that the figures in a README's ``text`` name."""
    before, after = BEGIN.split("{source}")
    return ROOT / text.split(before, 1)[1].split(after, 1)[0]


def fill(text: str, source: Path) -> str:
    """Return README's ``text`` with the figures of ``source``."""
    before = BEGIN.split("{source}")[0]
    head, rest = text.split(before, 1)
    return head + section(source) + rest.split(END, 1)[1]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.readme RESULT.json")
    README.write_text(fill(README.read_text(encoding="utf-8"), Path(sys.argv[1])), encoding="utf-8")
