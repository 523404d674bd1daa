"""``make gpu-report``: build, test and time on a machine with an NVIDIA GPU, in under nine minutes.

Needs no network and no installed peft_kernels: torch, Triton, pytest, and for the CPU kernels a
compiler and pybind11. Writes report.json, logs and the tests' junit files to $OUT (out/gpu-report/)
and prints a short table last. STAGE=tests builds and tests, STAGE=timing times what is there; names
of methods (ARGS="adapter prompt") time these alone; STAGE=training times training steps of a whole
model, which the report does not do unasked; LIMIT_S is how long it may take (500).
DRY_RUN=1 walks the same way without a GPU, in Triton's interpreter.

Exit status: 0, 1 if a test or a numerics gate failed, 2 without a GPU or for an unknown name.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.stages import Finished, end_all, run_stage  # noqa: E402 -- the path comes first

BUDGET_S = float(os.environ.get("LIMIT_S", "500"))  # of all stages; the table takes seconds
BUILD_S, TESTS_S = 90.0, 230.0
DRY_BUDGET_S = 150.0
LEAST_S = 15.0  # no timing process is started for less
STAGES = ("tests", "timing", "training")


class Report:
    """The report as it grows: every stage ends with the file rewritten."""

    def __init__(self, out: Path, dry: bool, ops: Sequence[str] | None = None) -> None:
        """Start the clock; ``ops``: the methods to time, None for all."""
        self.out, self.dry, self.ops = out, dry, ops
        self.ends = time.monotonic() + (DRY_BUDGET_S if dry else BUDGET_S)
        self.content: dict[str, Any] = {"format": 1, "dry_run": dry, "complete": False}

    def left(self) -> float:
        """Return the seconds left."""
        return self.ends - time.monotonic()

    def add(self, **found: Any) -> None:
        """Take in what a stage found and write the file."""
        from bench import store

        self.content |= found
        store.replace(self.out / "report.json", self.content)

    def stage(
        self,
        name: str,
        command: list[str],
        seconds: float,
        *,
        patience_s: float = 0.0,
        **environment: str,
    ) -> Finished:
        """Run one stage, its output in a log of its own, and say how it ended."""
        print(f"{name} ...", flush=True)
        limit = min(seconds, self.left())
        log = self.out / f"{name.replace(' ', '-')}.log"
        environment = _environment(self.dry) | environment
        done = run_stage([sys.executable, *command], log, limit, environment, ROOT, patience_s)
        print(f"{name}: {done}, log in {log}", flush=True)
        return done


def _environment(dry: bool) -> dict[str, str]:
    dropped = ("PEFT_KERNELS_", "PYTEST_", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    # Which plugins a machine happens to have must not decide how the tests run.
    given = {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if dry:
        # Interpreted kernels are Python: a second thread would only wait.
        given |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept | given


def build(report: Report) -> None:
    """Build the compiled kernels in place; without them the report goes on."""
    done = report.stage("build", ["setup.py", "build_ext", "--inplace"], BUILD_S)
    report.add(build={"ok": done.status == 0, "ended": str(done), "seconds": done.seconds})


def test(report: Report) -> None:
    """Run the tests marked ``gpu``: all of them skip in a dry run."""
    # Only these files are collected: others may import what this machine lacks.
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    shards = 2 if report.dry else max(1, min(14, (os.cpu_count() or 1) - 2))
    # Emptied: the repository's own options belong to plugins that may be missing here, and to
    # library versions whose warnings are known.
    options = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", "-m", "gpu", "-p", "bench.shard", "-v", "--tb=short", *options]

    def run(number: int) -> Finished:
        junit = report.out / f"junit-{number}.xml"
        junit.unlink(missing_ok=True)
        return report.stage(
            f"tests {number}", [*command, f"--junit-xml={junit}", *marked], TESTS_S,
            patience_s=10.0, SHARD=f"{number}/{shards}",
        )  # fmt: skip

    with ThreadPoolExecutor(shards) as pool:
        ended = list(pool.map(run, range(1, shards + 1)))
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for number in range(1, shards + 1):
        found = _outcomes(report.out / f"junit-{number}.xml", report.out / f"tests-{number}.log")
        counts += found[0]
        failed += found[1]
    # A shard without a test of its own ends with 5; that all are is told by the counts.
    clean = all(each.status in (0, 5) for each in ended)
    worst = next((each for each in ended if each.status not in (0, 5)), ended[0])
    report.add(
        tests={
            "ok": clean and (counts["passed"] > 0 or (report.dry and counts["skipped"] > 0)),
            "ended": str(worst), "seconds": max(each.seconds for each in ended),
            "shards": shards, "files": marked, "counts": dict(counts), "failed": failed,
        }
    )  # fmt: skip


def _outcomes(junit: Path, log: Path) -> tuple[Counter[str], list[str]]:
    """Return the numbers of outcomes and the failed tests; from the log if pytest was killed."""
    counts: Counter[str] = Counter()
    failed = []
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        lines = [x.split() for x in log.read_text("utf-8", errors="replace").splitlines()]
        for words in filter(None, lines):
            if len(words) > 1 and words[1] in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
                counts[words[1].lower()] += 1
                failed += [words[0]] if words[1] in ("FAILED", "ERROR") else []
        if lines and len(lines[-1]) == 1 and "::" in lines[-1][0]:
            counts["unfinished"] += 1
            failed.append(f"{lines[-1][0]} did not end")
        return counts, failed
    for case in cases:
        bad = next((child.tag for child in case if child.tag in ("failure", "error")), None)
        outcome = {"failure": "failed", "error": "error"}.get(bad or "")
        outcome = outcome or ("skipped" if case.find("skipped") is not None else "passed")
        counts[outcome] += 1
        if bad:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, failed


def measure(report: Report) -> None:
    """Time every item that fits; a process that dies costs the item it was at, no other."""
    import json

    from bench import gpu_timing

    pending = gpu_timing.items(report.dry, report.ops)
    state_path = report.out / "timing-state.json"
    rows: list[dict[str, Any]] = []
    crashed: dict[str, str] = {}
    peaks: list[dict[str, Any]] = []
    number = 0
    while pending and report.left() > LEAST_S:
        state_path.unlink(missing_ok=True)
        number += 1
        # The child ends on its own before its limit; a hung kernel does not.
        limit = report.left()
        command = ["-m", "bench.gpu_timing", str(state_path), str(limit - 10.0), *pending]
        done = report.stage(f"timing {number}", command, limit)
        try:
            state = json.loads(state_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            crashed["timing process"] = str(done)
            break
        rows += state["rows"]
        peaks = state["peaks"] or peaks
        finished = set(state["done"])
        if state["running"]:
            crashed[state["running"]] = str(done)
            finished.add(state["running"])
        pending = [item for item in pending if item not in finished]
        report.add(rows=rows, crashed=crashed, not_run=pending, peaks=peaks)
        if done.status == 0 or not finished:
            break
    report.add(rows=rows, crashed=crashed, not_run=pending, peaks=peaks)


def train(report: Report) -> None:
    """Time training steps of a whole model, as peft runs it and accelerated."""
    import json

    rows_path = report.out / "training.json"
    rows_path.unlink(missing_ok=True)
    limit = report.left()
    done = report.stage(
        "training", ["-m", "bench.training", str(rows_path), str(limit - 10.0)], limit
    )
    try:
        rows = json.loads(rows_path.read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        rows = []
    report.add(training={"ok": done.status == 0, "ended": str(done), "rows": rows})


def main(ops: Sequence[str] = ()) -> int:
    """Run the stages, timing ``ops`` or all methods, print the table, return the exit status."""
    import torch

    from bench.methods import METHODS

    if not set(ops) <= set(METHODS):
        print(f"gpu-report: methods are {', '.join(METHODS)}, got {' '.join(ops)}", file=sys.stderr)
        return 2

    stage = os.environ.get("STAGE", "")
    if stage and stage not in STAGES:
        print(f"gpu-report: stages are {', '.join(STAGES)}, got {stage}", file=sys.stderr)
        return 2
    dry = os.environ.get("DRY_RUN", "0") not in ("", "0")
    if not dry and not torch.cuda.is_available():
        print(
            f"gpu-report: torch {torch.__version__} finds no NVIDIA GPU here. DRY_RUN=1 walks the "
            "report without one.",
            file=sys.stderr,
        )
        return 2
    from bench import store
    from bench.gpu_summary import summary

    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-report").resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, dry, ops or None)
    report.add(machine=store.machine(torch.device("cpu" if dry else "cuda")))
    nothing = {"ok": True, "ended": "not asked for", "counts": {}, "failed": []}
    report.add(build=nothing, tests=nothing, rows=[], crashed={}, not_run=[])
    if stage in ("", "tests"):
        build(report)
        test(report)
    if stage in ("", "timing"):
        measure(report)
    if stage == "training":
        train(report)
    report.add(complete=True)
    text, ok = summary(report.content)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"{out / 'report.json'}")
    return 0 if ok else 1


def _terminated(number: int, frame: object) -> None:
    end_all()
    sys.exit(128 + number)


if __name__ == "__main__":
    # Stages are sessions of their own: no signal to the report reaches them.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _terminated)
    sys.exit(main(sys.argv[1:]))
