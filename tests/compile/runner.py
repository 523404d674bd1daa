"""Run what needs Triton's compiler in a process of its own, without its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def without_interpreter(module: str, *arguments: str) -> str:
    """Return what ``python -m module arguments`` prints; it must end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def sweep(family: str, dtype: str, method: str) -> list[dict[str, object]]:
    """Return what the sweep prints, a dict for each kernel."""
    printed = without_interpreter("tests.compile.sweep", family, dtype, "--method", method)
    return [json.loads(line) for line in printed.splitlines()]
