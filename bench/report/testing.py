"""The tests marked ``gpu``: all of them skip in a dry run.

They mostly wait for the compiler, which has one core: pytest-xdist spreads them over the cores, or,
where that is missing, as many processes that each run every n-th.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.report.stage import ROOT, Stage
from bench.report.text import limited
from bench.stages import Finished

NAME, SECONDS, DRY_SECONDS = "tests", 420.0, 150.0
A_TEST_S = 60
PATIENCE_S = 15.0  # to write what is known when the time is up
# Emptied: the repository's own options belong to plugins that may be missing here, and to library
# versions whose warnings are known.
OPTIONS = ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider", "-v", "--tb=short"]
_LINE = re.compile(r"(?:\[gw\d+\] \[ *\d+%\] )?(?:(PASSED|FAILED|ERROR|SKIPPED) )?(\S+::.*)")


def marked() -> list[str]:
    """Return the files with marked tests: others may import what this machine lacks."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]


def has_plugins() -> bool:
    """Return whether pytest-xdist and pytest-timeout can be imported."""
    return all(importlib.util.find_spec(name) for name in ("xdist", "pytest_timeout"))


def run(stage: Stage) -> None:
    """Run them, count the outcomes, name what failed."""
    files = marked()
    workers = 2 if stage.dry else max(1, min(15, (os.cpu_count() or 1) - 1))
    with tempfile.TemporaryDirectory() as folder:
        run_all = _by_xdist if has_plugins() else _by_shards
        ended, found = run_all(stage, Path(folder), files, workers)
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for each in found:
        counts += each[0]
        failed += each[1]
    # A shard without a test of its own ends with 5; that all are is told by the counts.
    worst = next((each for each in ended if each.status not in (0, 5)), ended[0])
    ok = worst.status in (0, 5) and not failed
    ok = ok and (counts["passed"] > 0 or (stage.dry and counts["skipped"] > 0))
    stage.add(files=files, workers=workers, counts=dict(counts), failed=failed)
    _shorten(stage.log)
    stage.end(ok, str(worst))
    said = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    stage.show(
        "\n".join([f"tests marked gpu: {said or 'none ran'}", *limited("TEST FAILED", failed)])
    )


Outcomes = tuple[Counter[str], list[str]]


def _by_xdist(
    stage: Stage, folder: Path, files: list[str], workers: int
) -> tuple[list[Finished], list[Outcomes]]:
    """Run them all by pytest-xdist, where a test that hangs or crashes costs itself alone."""
    junit = folder / "junit.xml"
    command = [
        "-m", "pytest", "-m", "gpu", "-p", "xdist", "-p", "pytest_timeout", "-p",
        "bench.report.guard", "-n", str(workers), "--dist", "worksteal", "--timeout",
        str(A_TEST_S), "--timeout-method", "thread", *OPTIONS, f"--junit-xml={junit}", *files,
    ]  # fmt: skip
    done = stage.run("tests", command, stage.left(), patience_s=PATIENCE_S)
    return [done], [outcomes(junit, stage.log)]


def _by_shards(
    stage: Stage, folder: Path, files: list[str], workers: int
) -> tuple[list[Finished], list[Outcomes]]:
    """Run them by processes side by side, and put their logs one after another."""
    command = ["-m", "pytest", "-m", "gpu", "-p", "bench.shard", *OPTIONS]
    numbers = range(1, workers + 1)

    def shard(number: int) -> Finished:
        given = [*command, f"--junit-xml={folder / f'{number}.xml'}", *files]
        return stage.run(
            f"tests {number}", given, stage.left(), patience_s=PATIENCE_S,
            log=folder / f"{number}.log", SHARD=f"{number}/{workers}",
        )  # fmt: skip

    with ThreadPoolExecutor(workers) as pool:
        ended = list(pool.map(shard, numbers))
    found = [outcomes(folder / f"{each}.xml", folder / f"{each}.log") for each in numbers]
    with stage.log.open("ab") as log:
        for each in numbers:
            log.write((folder / f"{each}.log").read_bytes())
    return ended, found


def outcomes(junit: Path, log: Path) -> Outcomes:
    """Return the numbers of outcomes and the failed tests; from the log if pytest was killed."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return _outcomes_of(log.read_text("utf-8", errors="replace"))
    results: dict[str, str] = {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = next((child.tag for child in case if child.tag in ("failure", "error")), None)
        outcome = {"failure": "failed", "error": "error"}.get(bad or "")
        outcome = outcome or ("skipped" if case.find("skipped") is not None else "passed")
        # One that failed and then ended its worker is there twice.
        results[name] = outcome if results.get(name) != "failed" else "failed"
    failed = [name for name, outcome in results.items() if outcome in ("failed", "error")]
    return Counter(results.values()), failed


def _outcomes_of(text: str) -> Outcomes:
    """Return what the lines of ``pytest -v`` say, by xdist or without."""
    results: dict[str, str] = {}
    for line in text.splitlines():
        found = _LINE.fullmatch(line.rstrip())
        if found is None:
            continue
        name, outcome = found[2], found[1]
        after = re.fullmatch(r"(.*?) +(PASSED|FAILED|ERROR|SKIPPED)\b.*", name)
        if after:
            name, outcome = after[1], after[2]
        name = name.strip()
        if outcome or name not in results:
            results[name] = outcome.lower() if outcome else "unfinished"
    failed = [name for name, outcome in results.items() if outcome in ("failed", "error")]
    failed += [f"{name} did not end" for name, each in results.items() if each == "unfinished"]
    return Counter(results.values()), failed


def _shorten(log: Path) -> None:
    """Leave out of the log the lines that only say that a test began, passed or was skipped."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    kept = [
        line
        for line in lines
        if not _LINE.fullmatch(line.rstrip()) or re.search(r"\b(FAILED|ERROR)\b", line)
    ]
    log.write_text("\n".join(kept) + "\n", encoding="utf-8")
