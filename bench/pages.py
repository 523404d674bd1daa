"""Writes docs/benchmarks.md from committed results; no figure on that page is typed by hand.

``python -m bench.pages`` takes the result file of a CPU that README names, and what lies in
``bench/results/h200``. A row that was not timed shows a dash, and says why below its table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import readme
from bench.method import DIRECTIONS, MIB, OURS
from bench.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
ON_GPU = ROOT / "bench" / "results" / "h200"
# What a column is called where its provider's own name would not say.
CALLED = {OURS: "peft_kernels", "compile": "torch.compile"}

_HEAD = """\
<!-- Written by python -m bench.pages; edits are lost. -->

# Benchmarks

Every table is made from result files in the repository. Times are milliseconds of one call, the
least of many interleaved runs. A row is timed only after its results were found as accurate as the
[rule](numerics.md) asks.

| column | what it computes |
|---|---|
| frozen | the base layer alone, without the method: the floor |
| eager | the method in plain PyTorch operations |
| factored | LoRA as three products of the GEMM library, the last two added in place |
| flash | prefix attention by concatenation, under a causal bias that SDPA's flash kernel takes |
| peft | the operations of peft's own form |
| torch.compile | the eager form, compiled |
| peft_kernels | this package, with the backend that it chooses itself |

What is computed in each case, and how to measure on another machine: `make bench` and
`make gpu-report`, from a clone. [The report of the H200](h200.md) says what else was seen there.
"""


def page() -> str:
    """Return the text of the page."""
    by_cpu, by_gpu = readme.source_of(readme.README.read_text("utf-8")), ON_GPU / "rows.json"
    on_cpu, on_gpu, training = map(_read, (by_cpu, by_gpu, ON_GPU / "training.json"))
    gpu = on_gpu["machine"]
    parts = [
        _HEAD,
        "## On a CPU",
        _made_on(on_cpu["machine"], [on_cpu["machine"]["commit"][:10]]),
        _figures(by_cpu),
        *_methods(on_cpu["rows"]),
        f"## On an {gpu['gpu']}",
        _made_on(gpu, dict.fromkeys(row["commit"] for row in on_gpu["rows"])),
        "Time on the device, cold L2. The device is kept busy while the host launches, so that no "
        "host time is in these.",
        _figures(by_gpu),
        *_methods(on_gpu["rows"]),
        "### Training steps",
        f"{training['what'][:1].upper()}{training['what'][1:]}. "
        + _made_on(training["machine"], dict.fromkeys(row["commit"] for row in training["rows"])),
        _training(training["rows"]),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _figures(source: Path) -> str:
    """Return the line in whose place the site has the figures of ``source``."""
    return f'[Drawn from]({os.path.relpath(source, PAGE.parent)} "figures")'


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _made_on(machine: dict[str, Any], commits: Iterable[str]) -> str:
    commits = list(commits)
    device = [machine["gpu"], f"driver {machine['driver']}"] if machine.get("gpu") else []
    device += [machine["cpu"], f"torch {machine['torch']}", f"Triton {machine['triton']}"]
    device += [f"Python {machine['python']}"]
    return f"{', '.join(device)}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    """Return heading, tables and remarks of every method that was measured."""
    parts = []
    for name, method in METHODS.items():
        own = [row for row in rows if row.get("op", "lora") == name]
        if own:
            parts += [f"### {method.name[:1].upper()}{method.name[1:]}".replace("Lora", "LoRA")]
            parts += [_timed(method.title, own, ("cpu", "gpu")), _failed(own)]
            parts += [_timed("host time", own, ("host",)), _saved(own)]
    return parts


def _timed(title: str, rows: list[dict[str, Any]], suites: tuple[str, ...]) -> str:
    """Return the times of the rows of these suites, a line a case and direction."""
    rows = [row for row in rows if row["case"]["suite"] in suites]
    timed = {row["provider"] for row in rows if row["status"] == "timed"}
    providers = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] in timed))
    found = {(row["case"]["name"], row["direction"], row["provider"]): row for row in rows}
    body = [
        [name, direction, *(_ms(found.get((name, direction, each))) for each in providers)]
        for name in dict.fromkeys(row["case"]["name"] for row in rows)
        for direction in DIRECTIONS
    ]
    header = [title, "direction", *(CALLED.get(each, each) for each in providers)]
    return readme.table(header, len(providers), body) if body else ""


def _ms(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] != "timed":
        return "-"
    least = row["timing"]["min_ms"]
    return f"{least:.4f}" if least < 0.1 else f"{least:.3f}" if least < 10 else f"{least:.1f}"


def _failed(rows: list[dict[str, Any]]) -> str:
    """Return which providers were not timed because their results were not accurate enough."""
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "failed":
            failed.setdefault(row["provider"], []).append(row["case"]["name"])
    return "\n".join(
        f"- {CALLED.get(provider, provider)} is not timed where its results miss the accuracy "
        f"rule: {', '.join(dict.fromkeys(names))}."
        for provider, names in failed.items()
    )


def _saved(rows: list[dict[str, Any]]) -> str:
    """Return the bytes kept for backward beyond the input and the parameters."""
    rows = [row for row in rows if row["case"]["suite"] == "memory"]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    found = {(row["case"]["name"], row["provider"]): row["saved_bytes"] for row in rows}
    body = [
        [name.removeprefix("saved "), *(_mib(found.get((name, each))) for each in providers)]
        for name in dict.fromkeys(row["case"]["name"] for row in rows)
    ]
    header = ["kept for backward beyond x, MiB", *(CALLED.get(each, each) for each in providers)]
    return readme.table(header, len(providers), body) if body else ""


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.2f}"


def _training(rows: list[dict[str, Any]]) -> str:
    header = ["case", "run by", "ms a step", "tokens/s", "peak, GiB", "losses"]
    body = [
        [
            row["case"], row["provider"], f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.0f}",
            f"{row['peak_gib']:.1f}", row["note"] or "-",
        ]
        for row in sorted(rows, key=lambda row: row["case"])
    ]  # fmt: skip
    return readme.table(header, 4, body)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
