"""``python -m peft_kernels bench``: measure every method against eager, compiled and frozen forms.

Prints every row, then the figures this project set itself with the values reached, then where the
host's time goes in a small call; writes all of it to a new file in ``bench/results/``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
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
    text = argparse.ArgumentParser("python -m peft_kernels bench", description=__doc__)
    text.add_argument(
        "--op", metavar="NAME", action="append",
        help="lora, adapter or prompt; may be repeated; default: all",
    )  # fmt: skip
    text.add_argument(
        "--suite", choices=(*SUITES, "all"), action="append",
        help="may be repeated; by default host and memory with gpu where there is one, else cpu",
    )  # fmt: skip
    text.add_argument("--cases", metavar="SUBSTRING", help="only cases whose name contains it")
    text.add_argument("--seconds", type=float, help="of timing per case, over all its rows")
    text.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/")
    text.add_argument("--plot", action="store_true", help="draw DIR/<name>.png too")
    text.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    text.add_argument(
        "--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing"
    )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return its exit status: 1 if a gate failed."""
    options = parser().parse_args(argv)
    import torch

    from bench import methods, store, tables, third_party
    from bench.rows import FAILED, plain
    from bench.targets import figures

    unknown = set(options.op or ()) - set(methods.METHODS)
    if unknown:
        known = ", ".join(methods.METHODS)
        print(f"bench: --op {unknown.pop()}: there are {known}", file=sys.stderr)
        return 2

    has_gpu = torch.cuda.is_available()
    suites = _suites(options.suite, has_gpu)
    if "gpu" in suites and not has_gpu:
        print("bench: --suite gpu needs a GPU that torch can use", file=sys.stderr)
        return 2
    started = time.monotonic()
    measured = [(suite, *_run(suite, options, has_gpu)) for suite in suites]
    rows = [row for _, found, _, _ in measured for row in found]
    if not rows:
        print(f"bench: no case of {_asked(options, suites)}", file=sys.stderr)
        return 2
    profiles = {name: each for *_, found in measured for name, each in found.items()}
    reached = figures(rows, suites=suites)
    described = store.machine(torch.device("cuda" if has_gpu else "cpu"))
    content: dict[str, Any] = {
        "format": 2,
        "quick": options.quick,
        "machine": described,
        "pinned": {name: os.environ.get(name) for name in PINNED},
        "peaks": [asdict(each) for _, _, peaks, _ in measured for each in peaks],
        "rows": [plain(row) for row in rows],
        "figures": [asdict(each) for each in reached],
        "host_profile": profiles,
        "seconds": round(time.monotonic() - started, 1),
    }
    path = store.write_new(options.out or store.RESULTS, store.file_stem(described), content)
    print("Times in ms a call; ratios and roofline of the minimum; eager: the fastest such form\n")
    print(tables.table(rows))
    if profiles:
        print("\nWhere the host's time goes (under the profiler, which slows Python down)")
        print(tables.profile_table(profiles))
    title = "Figures, of tiny shapes that measure nothing" if options.quick else "Figures"
    print(f"\n{title}\n{tables.figure_table(reached)}")
    print(f"\n{third_party.listed()}")
    print(f"\n{content['seconds']:.0f} s; written to {path}")
    if options.plot:
        from bench.plot import plot

        folder = options.out or ROOT / "bench" / "figures"
        print(f"figure: {plot(path, folder / f'{path.stem}.png')}")
    return 1 if any(row.status == FAILED for row in rows) else 0


def _asked(options: argparse.Namespace, suites: Sequence[str]) -> str:
    contains = "" if options.cases is None else f" contains {options.cases!r}"
    return f"{', '.join(options.op or ('any method',))} in {', '.join(suites)}{contains}"


def _suites(asked: Sequence[str] | None, has_gpu: bool) -> list[str]:
    if not asked:
        return ["gpu" if has_gpu else "cpu", "host", "memory"]
    if "all" in asked:
        return [name for name in SUITES if name != "gpu" or has_gpu]
    return [name for name in SUITES if name in asked]


def _run(
    suite: str, options: argparse.Namespace, has_gpu: bool
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Return the rows, peaks and host profiles of one suite."""
    import torch

    from bench import methods
    from bench.hosttime import profile_host
    from bench.rows import PeakTable, guarded

    device = torch.device("cuda" if has_gpu and suite != "cpu" else "cpu")
    peaks = PeakTable(device, tiny=options.quick or suite == "host")
    # The whole grid of a GPU takes hours: it is measured in parts that --cases names.
    reported = suite == "gpu" and options.cases is None
    chosen = [
        (method, method.quick(case) if options.quick else case)
        for method in methods.chosen(options.op)
        for case in method.of_suite(suite, reported=reported)
        if (options.cases or "") in case.name
    ]
    rows: list[Any] = []
    profiles: dict[str, Any] = {}
    for index, (method, case) in enumerate(chosen, 1):
        print(f"[{suite} {index}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
        rows += guarded(partial(_case, method, case, suite, options, peaks), case)
        if suite == "host":
            calls = 50 if options.quick else 2000
            profiles |= profile_host(case, method.ours, device, calls=calls)
    return peaks.fill(rows), list(peaks.measured.values()), profiles


def _case(method: Any, case: Any, suite: str, options: argparse.Namespace, peaks: Any) -> list[Any]:
    """Return the rows of one case."""
    from bench.method import COMPILED
    from bench.rows import measure_case, saved_row

    compiles = not options.no_compile and not options.quick and suite in ("cpu", "gpu")
    providers = [each for each in method.providers if compiles or each.name != COMPILED]
    if suite == "memory":
        return [saved_row(case, each, peaks.device) for each in providers if not each.frozen]
    seconds = 0.2 if options.quick else method.seconds[suite]
    if options.seconds is not None:
        seconds = options.seconds
    return measure_case(case, providers, peaks.device, seconds, peaks)


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
