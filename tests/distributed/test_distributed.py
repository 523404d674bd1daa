"""More than one process: one launch of ``torchrun`` per world size runs all checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, torchrun

pytest.importorskip("transformers")

from tests.distributed.worker import CHECKS

# It takes a third of the time of all: once is enough.
SLOW = {"tp_compiled"}


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_compute_what_one_process_does(processes: int, tmp_path: Path) -> None:
    """One test for all checks: under pytest-xdist each would make a launch of its own."""
    checks = [check for check in CHECKS if processes == 2 or check not in SLOW]
    worker = str(ROOT / "tests/distributed/worker.py")
    done = torchrun(processes, worker, str(tmp_path), *checks)
    failed = []
    for rank in range(processes):
        path = tmp_path / f"rank{rank}.jsonl"
        rows = [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []
        for row in rows:
            if row["problem"]:
                failed.append(f"rank {rank}, {row['check']}: {row['problem']}")
        if len(rows) < len(checks):
            failed.append(f"rank {rank} did not come to {', '.join(checks[len(rows) :])}")
    assert not failed, "\n".join([*failed, done.stdout[-3000:], done.stderr[-3000:]])
    assert done.returncode == 0, done.stderr
