"""Run what needs Triton's compiler in a process of its own, without its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence


def without_interpreter(module: str, *arguments: str) -> str:
    """Return what ``python -m module arguments`` prints; it must end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def unclean(family: str, dtypes: Sequence[str], method: str) -> dict[str, list[str]]:
    """Compile every case of a method for a family; return the problems of those that have any."""
    from tests.compile.sweep import cases

    printed = without_interpreter("tests.compile.sweep", family, *dtypes, "--method", method)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["case"] for line in lines] == [
        f"{family} {dtype} {case.name}" for dtype in dtypes for case in cases(family, dtype, method)
    ]
    return {line["case"]: line["problems"] for line in lines if line["problems"]}
