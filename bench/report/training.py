"""Tokens a second and peak memory of training steps: peft eager, peft compiled, accelerated.

``bench.training`` measures; compiling has processes and a time limit of its own, since it may take
long, and a process that dies costs the item it was at.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import store, training
from bench.report.stage import Stage
from bench.training import Result, failed, table

NAME, SECONDS, DRY_SECONDS = "training", 500.0, 150.0
COMPILE_S = 160.0
LEAST_S = 20.0  # no process is started for less


def run(stage: Stage) -> None:
    """Measure item after item while there is time, and show them beside peft's own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(stage, Path(folder) / "rows.json")
    results = [Result(**row) for row in rows]
    timed = sum(each.step_ms is not None for each in results)
    ok = timed > 0 and not any(failed(each) for each in results)
    stage.end(ok, f"{timed} of {len(results)} timed")
    stage.show(table(results))


def _measure(stage: Stage, path: Path) -> list[dict[str, Any]]:
    pending = training.items(not stage.dry)
    rows: list[dict[str, Any]] = []
    while pending and stage.left() > LEAST_S:
        compiling = _compiles(pending[0])
        batch = pending[:1]
        while not compiling and len(batch) < len(pending):
            if _compiles(pending[len(batch)]):
                break
            batch.append(pending[len(batch)])
        limit = min(stage.left(), COMPILE_S if compiling else stage.left())
        command = ["-m", "bench.training", str(path), str(limit - 10.0), *batch]
        done = stage.run("training, compiled" if compiling else "training", command, limit)
        state = {"rows": rows, "running": batch[0]}
        if path.exists():
            state = json.loads(path.read_text(encoding="utf-8"))
        rows, running = state["rows"], state["running"]
        if running:
            provider, case = running.split("@", 1)
            rows.append(asdict(Result(case, provider, f"crashed: {done}")))
        elif done.status not in (0, 1):
            provider, case = batch[0].split("@", 1)
            rows.append(asdict(Result(case, provider, f"no result: {done}")))
        known = {f"{row['provider']}@{row['case']}" for row in rows}
        pending = [item for item in pending if item not in known]
        store.replace(path, {"rows": rows, "running": None})
        stage.add(rows=rows)
    for item in pending:
        provider, case = item.split("@", 1)
        rows.append(asdict(Result(case, provider, "not run, out of time")))
    stage.add(rows=rows)
    return rows


def _compiles(item: str) -> bool:
    return training.compiles(item.split("@", 1)[0])
