"""The times of one method: every case against its baselines, and every kernel variant.

Each case passes its numerics gate before it is timed. ``bench.gpu_timing`` does the work in
processes of its own; one that dies costs the item it was at, no other. Kernels are compiled first,
by processes side by side: a compiler has one core, and the device waits for nobody while it times.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.methods import METHODS
from bench.report.stage import Stage
from bench.report.text import timing_text

SECONDS = {"lora": 240.0, "adapter": 180.0, "prefix": 360.0, "prompt": 120.0}
OTHERS_S, DRY_SECONDS = 240.0, 150.0
LEAST_S = 15.0  # no process is started for less
PREPARE_S, SIDE_BY_SIDE = 60.0, 12
NAMES = tuple(METHODS)


def run(stage: Stage) -> None:
    """Time every item that fits of the method that the stage is named after."""
    with tempfile.TemporaryDirectory() as folder:
        _measure(stage, Path(folder) / "state.json")
    text, ok = timing_text(stage.content)
    crashed, not_run = stage.content["crashed"], stage.content["not_run"]
    items = len(stage.content["done"])
    said = [f"{items} items timed", f"{len(crashed)} crashed", f"{len(not_run)} not run"]
    stage.end(ok and items > 0, ", ".join(said))
    stage.show(text)


def _measure(stage: Stage, state_path: Path) -> None:
    from bench import gpu_timing

    pending = gpu_timing.items(stage.dry, [stage.name])
    rows: list[dict[str, Any]] = []
    crashed: dict[str, str] = {}
    peaks: list[dict[str, Any]] = []
    done: list[str] = []
    stage.add(rows=rows, crashed=crashed, not_run=pending, peaks=peaks, done=done)
    if not stage.dry:  # an interpreter compiles nothing
        _prepare(stage, pending, state_path.parent)
    while pending and stage.left() > LEAST_S:
        state_path.unlink(missing_ok=True)
        # The child ends on its own before its limit; a hung kernel does not.
        limit = stage.left()
        command = ["-m", "bench.gpu_timing", str(state_path), str(limit - 10.0), *pending]
        ended = stage.run(stage.name, command, limit)
        try:
            state = json.loads(state_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            crashed["timing process"] = str(ended)
            break
        rows += state["rows"]
        peaks = state["peaks"] or peaks
        finished = set(state["done"])
        done += state["done"]
        if state["running"]:
            crashed[state["running"]] = str(ended)
            finished.add(state["running"])
        pending = [item for item in pending if item not in finished]
        stage.add(not_run=pending, peaks=peaks)
        if ended.status == 0 or not finished:
            break
    stage.add(rows=rows, crashed=crashed, not_run=pending, peaks=peaks, done=done)


def _prepare(stage: Stage, items: Sequence[str], folder: Path) -> None:
    """Compile what the items will run; what is missing after its time is compiled when needed."""
    started, limit = stage.left(), min(PREPARE_S, stage.left() / 3)
    workers = max(1, min(SIDE_BY_SIDE, len(items), (os.cpu_count() or 1) - 1))

    def prepare(number: int) -> bool:
        log = folder / f"prepare-{number}.log"
        log.touch()
        seconds = limit - (started - stage.left())
        if seconds <= 0:
            return False
        command = ["-m", "bench.gpu_timing", "--prepare", items[number]]
        # Of torch.compile too: each would start as many compilers as there are cores.
        done = stage.run(
            f"prepare {items[number]}", command, seconds, log=log, quiet=True,
            TORCHINDUCTOR_COMPILE_THREADS="1",
        )  # fmt: skip
        return done.status == 0

    with ThreadPoolExecutor(workers) as pool:
        ready = sum(pool.map(prepare, range(len(items))))
    print(f"{stage.name}: {ready} of {len(items)} compiled in {started - stage.left():.0f} s")
    with stage.log.open("ab") as whole:
        for number in range(len(items)):
            whole.write((folder / f"prepare-{number}.log").read_bytes())
