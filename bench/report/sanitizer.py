"""compute-sanitizer over one small run of each kernel: memcheck, then racecheck.

Every kernel of ``bench.sanitizer_run`` has a process of its own for each tool, several side by
side, so that one that takes too long loses itself alone. Two kernels that are wrong on purpose show
that the tools see this machine's kernels: where they find nothing, zero errors mean nothing. A dry
run walks the kernels without the tool.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.report.stage import Stage
from bench.report.text import limited

NAME, SECONDS, DRY_SECONDS = "sanitizer", 480.0, 150.0
TOOLS = {"memcheck": 200.0, "racecheck": 240.0}  # the most that one process may take
SIDE_BY_SIDE = 12  # most of a run is Python and the compiler, which have one core
SHOWN = 3  # errors of each run
OPTIONS = [
    # ptxas and other children use no GPU. A broken call shows itself by an exception.
    "--target-processes", "application-only", "--report-api-errors", "no",
    "--destroy-on-device-error", "kernel", "--show-backtrace", "no", "--launch-timeout", "120",
    "--print-limit", "20",
]  # fmt: skip
_BROKEN = re.compile(r"^=+ (Internal Sanitizer Error: .*)$", re.MULTILINE)
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


def find() -> str | None:
    """Return the path of compute-sanitizer, or None where there is none."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    beside = [str(each) for each in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin")]
    places = [os.environ.get("PATH", os.defpath), f"{home}/bin", f"{home}/compute-sanitizer"]
    found = (shutil.which("compute-sanitizer", path=place) for place in (*places, *beside))
    return next(filter(None, found), None)


def run(stage: Stage) -> None:
    """Run every kernel under both tools, and say what they found."""
    from bench.sanitizer_run import KERNELS, PLANTED
    from peft_kernels.core import cuda_library

    names = list(KERNELS)
    if stage.dry:  # there is no CUDA, and prefix attention's variants launch the same kernels
        names = [name for name in names if not name.startswith(("cuda:", "triton:prefix-split"))]
    tool = find()
    stage.add(tool=None if stage.dry else tool, runs=[])
    if stage.dry:
        runs = _walk(stage, names)
        _finish(stage, runs, [])
        return
    if tool is None:
        stage.end(False, "compute-sanitizer not found on PATH or in CUDA_HOME: nothing was checked")
        stage.show(f"sanitizer: {stage.content['ended']}")
        return
    missing = []
    if cuda_library.build_info() is None:
        missing = [name for name in names if name.startswith("cuda:")]
        names = [name for name in names if name not in missing]
    planted = [(each, name) for name, each in PLANTED.items()]
    asked = [*planted, *((each, name) for each in TOOLS for name in names)]
    runs = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        given = [(stage, tool, *pair, Path(folder), i) for i, pair in enumerate(asked)]
        for found in pool.map(lambda each: _check(*each), given):
            runs.append(found)
            stage.add(runs=runs)
    _finish(stage, runs, [f"{name}: the CUDA library is not built" for name in missing])


def _check(
    stage: Stage, tool: str, which: str, name: str, folder: Path, number: int
) -> dict[str, Any]:
    """Run one kernel under one tool, and read what it printed."""
    from bench.sanitizer_run import KERNEL_NAMES

    log = folder / f"{number}.log"
    log.touch()
    if stage.left() < 10.0:
        return read(which, name, "", "not run, out of time")
    driver = ["-m", "bench.sanitizer_run", name]
    if name.startswith("planted:"):
        driver += ["--precision", "float32"]
    command = [
        "--tool", which, *OPTIONS, "--kernel-name", f"regex={KERNEL_NAMES}",
        "--port", str(49152 + 16 * number), sys.executable, *driver,
    ]  # fmt: skip
    # Memory from CUDA itself, tensor by tensor: behind the end of one, nothing else lies.
    done = stage.run(
        f"{which} {name}", command, TOOLS[which], log=log, program=tool,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    text = log.read_text("utf-8", errors="replace")
    with stage.log.open("a", encoding="utf-8") as whole:
        whole.write(f"\n=== {which} {name}: {done}\n{text[-20_000:]}")
    return read(which, name, text, "" if done.status == 0 else str(done))


def read(which: str, name: str, text: str, ended: str) -> dict[str, Any]:
    """Return what a tool found: None errors where it said nothing in the end.

    Args:
        which: the tool.
        name: of the kernel.
        text: what tool and driver printed.
        ended: how, if not well.
    """
    summary = _SUMMARY.findall(text)
    # A second summary counts those that were not printed.
    numbers = [int(each) for line in summary for each in re.findall(r"(\d+) errors?\b", line)]
    if broken := _BROKEN.search(text):  # what it counts then is that the program did not end well
        numbers, ended = [], broken[1]
    ran = re.findall(r"^ran (\S+) (\S+): ?(.*)$", text, re.MULTILINE)
    lines = [line.removeprefix("=========").strip() for line in text.splitlines()]
    marks = ("Invalid ", "Error:", "Race reported", "Warning:", "Target application", "Misaligned ")
    first = [
        " ".join(lines[at : at + 2])[:240]
        for at, line in enumerate(lines)
        if line.startswith(marks) and text.splitlines()[at].startswith("=====")
    ]
    if not first and not numbers:
        first = [line[:240] for line in lines if line][-SHOWN:]
    return {
        "tool": which, "name": name, "errors": max(numbers, default=None),
        "summary": summary[-1] if summary else None, "ended": ended,
        "ran": [f"{kernel} {precision}" for kernel, precision, _ in ran],
        "launched": sorted({each for *_, launched in ran for each in launched.split()}),
        "first": first[:SHOWN],
    }  # fmt: skip


def _walk(stage: Stage, names: Sequence[str]) -> list[dict[str, Any]]:
    """Run the kernels without the tool, in two processes."""
    halves = [list(names[::2]), list(names[1::2])]
    with tempfile.TemporaryDirectory() as folder:

        def walk(number: int) -> dict[str, Any]:
            log = Path(folder) / f"{number}.log"
            command = ["-m", "bench.sanitizer_run", *halves[number], "--precision", "float32"]
            done = stage.run(f"kernels {number + 1}", command, stage.left(), log=log)
            text = log.read_text("utf-8", errors="replace")
            with stage.log.open("a", encoding="utf-8") as whole:
                whole.write(text)
            ended = "" if done.status == 0 else str(done)
            return read("none", ", ".join(halves[number]), text, ended)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(walk, range(2)))


def bad(found: dict[str, Any]) -> str | None:
    """Return what is wrong with a run, or None."""
    planted = found["name"].startswith("planted:")
    if found["tool"] != "none" and found["errors"] is None:
        return f"no result: {found['ended'] or 'the tool printed no summary'}"
    if planted:
        return None if found["errors"] else "the error that was planted is NOT FOUND"
    if found["errors"]:
        return f"{found['errors']} errors"
    return found["ended"] or (None if found["ran"] else "nothing ran")


def _finish(stage: Stage, runs: list[dict[str, Any]], missing: list[str]) -> None:
    lines = []
    for which in dict.fromkeys(each["tool"] for each in runs):
        mine = [each for each in runs if each["tool"] == which]
        clean = [each for each in mine if bad(each) is None and not _planted(each)]
        kernels = {kernel for each in clean for kernel in each["launched"]}
        errors = sum(each["errors"] or 0 for each in mine if not _planted(each))
        label = "without the tool" if which == "none" else f"{which}: {errors} errors"
        done = sum(len(each["ran"]) for each in mine if not _planted(each))
        lines.append(f"{label}; {done} runs ended, of {len(kernels)} kernels of Triton's")
    wrong = [
        f"{each['tool']} {each['name']}: {bad(each)}" + "".join(f" | {e}" for e in each["first"])
        for each in runs
        if bad(each) is not None
    ]
    lines += limited("SANITIZER", [*wrong, *missing], width=400)
    stage.add(runs=runs, missing=missing)
    stage.end(bool(runs) and not wrong and not missing, f"{len(wrong) + len(missing)} runs not ok")
    stage.show("\n".join(lines))


def _planted(found: dict[str, Any]) -> bool:
    return str(found["name"]).startswith("planted:")
