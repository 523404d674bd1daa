"""Scripts in processes of their own, one or several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(*command: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    """Run a script in one process, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=environment, timeout=timeout_s, capture_output=True, text=True, check=False,
    )  # fmt: skip


def torchrun(
    processes: int, *command: str, timeout_s: float = 150
) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes of this machine."""
    ranks = f"--nproc-per-node={processes}"
    launcher = ("-m", "torch.distributed.run", "--standalone", ranks)
    return python(*launcher, *command, timeout_s=timeout_s)
