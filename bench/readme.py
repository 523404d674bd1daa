"""Writes the measured figures into README.md, from a file that ``bench.run`` wrote.

``python -m bench.readme RESULT.json`` replaces what stands between the two markers; no figure in
README is typed by hand. A row that was not timed shows a dash.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- figures of {source} -->", "<!-- end of figures -->"
_PROVIDERS = {
    "eager": "eager", "factored": "factored", "compile": "torch.compile", "fused": "peft_kernels",
}  # fmt: skip
_RATIOS = {"cpu": "ratio_frozen", "gpu": "ratio_frozen", "host": "ratio_eager"}


def section(source: Path) -> str:
    """Return README's figures from a result file, markers included."""
    content = json.loads(source.read_text(encoding="utf-8"))
    if content["quick"]:
        raise ValueError(f"{source} was measured with --quick: its figures mean nothing")
    begin = BEGIN.format(source=source.resolve().relative_to(ROOT))
    parts = [_machine(content["machine"]), _table(content["rows"]), _words(content)]
    return "\n".join([begin, "", "\n\n".join(parts), "", END])


def _machine(machine: dict[str, Any]) -> str:
    commit = machine["commit"][:10] + (", with uncommitted changes" if machine["dirty"] else "")
    return (
        f"Measured on {machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, commit "
        f"{commit}: least time of interleaved runs over that of the frozen `nn.Linear` (1.00 is "
        f"the floor), rank 16. Read the columns beside each other, not the third digit."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens x in x out, dtype, dropout | direction | "
        + " | ".join(_PROVIDERS.values())
        + " |",
        "|---|---|" + "---:|" * len(_PROVIDERS),
    ]
    found = {(row["case"]["name"], row["direction"], row["provider"]): row for row in rows}
    cases = dict.fromkeys(
        (row["case"]["name"], row["direction"])
        for row in rows
        if row["case"]["suite"] in ("cpu", "gpu")
    )
    for name, direction in cases:
        cells = [_ratio(found.get((name, direction, provider))) for provider in _PROVIDERS]
        lines.append(f"| {name} | {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] != "timed":
        return "-"
    value = row[_RATIOS[row["case"]["suite"]]]
    return "-" if value is None else f"{value:.2f}"


def _words(content: dict[str, Any]) -> str:
    lines = []
    for row in content["rows"]:
        case = row["case"]
        if row["provider"] != "fused":
            continue
        if case["suite"] == "host":
            lines.append(
                f"- Host time of {case['name'].removeprefix('host ')}, {row['direction']}: "
                f"{_ratio(row)} of eager's."
            )
        elif case["suite"] == "memory" and row["saved_bytes"] is not None:
            eager = next(
                other["saved_bytes"]
                for other in content["rows"]
                if other["case"] == case and other["provider"] == "eager"
            )
            lines.append(
                f"- {case['name'].capitalize()} for backward beyond x: "
                f"{row['saved_bytes'] / 2**20:.2f} MiB; eager: {eager / 2**20:.2f} MiB."
            )
    missed = [each for each in content["figures"] if each["reached"] is False]
    lines += [
        f"- Not reached: {each['target']} at most {each['limit']:g}, got {each['value']:.3f} "
        f"({each['detail']})."
        for each in missed
        if each["value"] is not None
    ]
    return "\n".join(lines)


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
