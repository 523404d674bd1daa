"""More than one process: one launch of ``torchrun`` per world size runs all checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.distributed.worker import CHECKS

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, *command: str, timeout_s: float = 150) -> subprocess.CompletedProcess:
    """Run a script in several processes on this machine; its output is text."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *command],
        cwd=ROOT, env=environment, timeout=timeout_s, capture_output=True, text=True, check=False,
    )  # fmt: skip


# Half of the time of all: once is enough.
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
        failed += [
            f"rank {rank}, {row['check']}: {row['problem']}" for row in rows if row["problem"]
        ]
        missing = checks[len(rows) :]
        if missing:
            failed.append(f"rank {rank} did not come to {missing[0]} and {len(missing) - 1} more")
    assert not failed, "\n".join([*failed, done.stdout[-3000:], done.stderr[-3000:]])
    assert done.returncode == 0, done.stderr
