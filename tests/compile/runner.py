"""Run ``tests.compile.sweep`` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def sweep(family: str, dtype: str, method: str) -> list[dict[str, object]]:
    """Return what the sweep prints, a dict for each kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile.sweep", family, dtype, "--method", method],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
