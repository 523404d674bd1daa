"""Runs the demo as its users do: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class QuickRun:
    """A finished ``demo --quick``."""

    out: Path
    finished: subprocess.CompletedProcess[str]


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "peft_kernels", "demo", *options]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # One thread each, as other tests run beside this one: two that wait for each other spin.
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    out = tmp_path_factory.mktemp("quick") / "deeper" / "demo"
    finished = subprocess.run(
        command("--quick", "--device", "cpu", "--out", str(out)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return QuickRun(out, finished)
