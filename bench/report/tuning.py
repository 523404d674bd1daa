"""Candidate tiles measured on the GPU by ``bench.tune``, which writes the tables' JSON."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

from bench.report.stage import Stage

NAME, SECONDS, DRY_SECONDS = "tune", 480.0, 30.0
LINES = 40


def run(stage: Stage) -> None:
    """Run the module, keep its JSON as ``table``, and print the end of what it printed."""
    if importlib.util.find_spec("bench.tune") is None:
        stage.end(True, "there is no bench.tune in this tree: nothing was tuned")
        stage.show(f"tune: {stage.content['ended']}")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        limit = stage.left()
        options = ["--dry"] if stage.dry else []
        command = ["-m", "bench.tune", str(path), str(limit - 10.0), *options]
        done = stage.run("tune", command, limit)
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    stage.add(table=table)
    stage.end(done.status == 0 and table is not None, str(done))
    printed = stage.log.read_text("utf-8", errors="replace").splitlines()
    print("\n".join(line[:160] for line in printed[-LINES:]))
