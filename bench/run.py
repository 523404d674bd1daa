"""``python -m peft_kernels bench``: measure every method against eager, compiled and frozen forms.

Prints every row, then the figures this project set itself with the values reached, then the host
time of small calls beside the committed one, and where it goes; writes all of it to a new file in
``bench/results/`` and draws it beside that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

# Read when a process starts. Unpinned, both threads may land on one core; with the default
# thresholds every large tensor is mapped and unmapped anew, page by page.
PINNED = {
    "OMP_PROC_BIND": "true",
    "OMP_PLACES": "cores",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=4294967296",
}
SUITES = ("cpu", "host", "memory", "gpu")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    text = argparse.ArgumentParser(
        "python -m peft_kernels bench", description=__doc__,
        epilog="With --tune it measures tiles on the GPU at hand instead, and takes other options: "
        "--tune --help.",
    )  # fmt: skip
    text.add_argument(
        "--op", metavar="NAME", action="append",
        help="lora, adapter, prefix or prompt; may be repeated; default: all",
    )  # fmt: skip
    text.add_argument(
        "--suite", choices=(*SUITES, "all"), action="append",
        help="may be repeated; by default host and memory with gpu where there is one, else cpu",
    )  # fmt: skip
    text.add_argument("--cases", metavar="SUBSTRING", help="only cases whose name contains it")
    text.add_argument(
        "--baseline", metavar="NAME", action="append",
        help="what is measured beside ours, such as eager; may be repeated; by default all, "
        "of torch.compile on a CPU one case of each kind",
    )  # fmt: skip
    text.add_argument("--seconds", type=float, help="of timing per case at most, over all its rows")
    text.add_argument("--output", type=Path, metavar="DIR", help="default: bench/results/")
    text.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    text.add_argument(
        "--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing"
    )
    text.add_argument(
        "--write-host-baseline", action="store_true",
        help="measure nothing but the host time of small calls, and write the file that tests "
        "compare it with",
    )  # fmt: skip
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return its exit status: 1 if a gate failed."""
    options = parser().parse_args(argv)
    import torch

    from bench import host_baseline, progress, store, third_party
    from bench.rows import FAILED, PeakTable, plain
    from bench.steps import Asked, Found, steps
    from bench.targets import figures

    if options.write_host_baseline:
        print(f"written: {host_baseline.write()}")
        return 0
    asked = Asked(
        options.op, options.cases, options.baseline, not options.no_compile, options.quick,
        options.seconds,
    )  # fmt: skip
    has_gpu = torch.cuda.is_available()
    suites = _suites(options.suite, has_gpu)
    folder = options.output or store.RESULTS
    refused = asked.refused() or store.why_not_writable(folder)
    if "gpu" in suites and not has_gpu:
        refused = "--suite gpu needs a GPU that torch can use"
    todo = [] if refused else [step for suite in suites for step in steps(suite, asked)]
    if not todo:
        print(f"bench: {refused or f'no case of {_words(asked, suites)}'}", file=sys.stderr)
        return 2
    started = time.monotonic()
    devices = {suite: "cuda" if has_gpu and suite != "cpu" else "cpu" for suite in suites}
    found = Found(
        asked,
        {
            suite: PeakTable(torch.device(device), tiny=options.quick or suite == "host")
            for suite, device in devices.items()
        },
    )
    for step in progress.shown(todo):
        found.measure(step)
    rows = found.rows()
    reached = figures(rows, suites=suites)
    described = store.machine(torch.device("cuda" if has_gpu else "cpu"))
    content: dict[str, Any] = {
        "format": 2,
        "quick": options.quick,
        "machine": described,
        "pinned": {name: os.environ.get(name) for name in PINNED},
        "peaks": [
            {"suite": suite, **asdict(each)}
            for suite, table in found.peaks.items()
            for each in table.measured.values()
        ],
        "rows": [plain(row) for row in rows],
        "figures": [asdict(each) for each in reached],
        "host": [asdict(each) for each in found.hosts],
        "host_profile": found.profiles,
        "seconds": round(time.monotonic() - started, 1),
    }
    path = store.write_new(folder, store.file_stem(described), content)
    _print(content, rows, reached, found.hosts)
    print(f"\n{third_party.listed()}")
    print(f"\n{content['seconds']:.0f} s; written to {path}")
    _draw(path)
    return 1 if any(row.status == FAILED for row in rows) else 0


def _suites(asked: Sequence[str] | None, has_gpu: bool) -> list[str]:
    if not asked:
        return ["gpu" if has_gpu else "cpu", "host", "memory"]
    if "all" in asked:
        return [name for name in SUITES if name != "gpu" or has_gpu]
    return [name for name in SUITES if name in asked]


def _words(asked: Any, suites: Sequence[str]) -> str:
    contains = "" if asked.contains is None else f" contains {asked.contains!r}"
    return f"{', '.join(asked.ops or ('any method',))} in {', '.join(suites)}{contains}"


def _print(
    content: dict[str, Any], rows: Sequence[Any], reached: Sequence[Any], hosts: Sequence[Any]
) -> None:
    from bench import host_baseline, tables

    print("Times in ms a call; ratios and roofline of the minimum; eager: the fastest such form\n")
    print(tables.table(rows))
    if content["host_profile"]:
        print("\nWhere the host's time goes (under the profiler, which slows Python down)")
        print(tables.profile_table(content["host_profile"]))
    if hosts:
        print(f"\nHost time of small calls\n{host_baseline.table(hosts)}")
    title = "Figures, of tiny shapes that measure nothing" if content["quick"] else "Figures"
    print(f"\n{title}\n{tables.figure_table(reached)}")


def _draw(path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no figures: matplotlib is not installed")
        return
    from bench import plots

    drawn = plots.draw(path, path.parent)
    for figure in drawn:
        print(f"figure: {figure}")
    names = {figure.stem.removeprefix(f"{path.stem}-") for figure in drawn}
    if absent := [name for name in plots.FIGURES if name not in names]:
        print(f"not drawn: {', '.join(absent)}; nothing of it was measured, or too little to see")


def pin() -> None:
    """Start this process anew with the pinned environment, unless it has it."""
    if any(os.environ.get(name) != value for name, value in PINNED.items()):
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **PINNED})


if __name__ == "__main__":
    pin()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench: interrupted, nothing was written")
