"""The pytest-benchmark files run, and a provider with wrong results has no row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.store import ROOT


def test_pytest_benchmarks_run_and_a_broken_provider_fails(tmp_path: Path) -> None:
    plugin = tmp_path / "break_fused.py"
    plugin.write_text(
        "from dataclasses import replace\nfrom bench.methods import METHODS\n"
        "from tests.bench.problems import SCALED\n"
        "lora = METHODS['lora']\n"
        "broken = (*lora.providers[:-1], replace(SCALED, name='fused'))\n"
        "METHODS['lora'] = replace(lora, providers=broken)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "bench/", "-q",
            "--bench-cases", "tiny", "--benchmark-disable", "-p", "break_fused",
            "-p", "no:cacheprovider", "-p", "no:xdist",
        ],
        cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 failed, 34 passed" in done.stdout
    assert done.stdout.count("fused fails the numerics gate: y error") >= 4
