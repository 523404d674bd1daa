"""Every prompt kernel compiles for six GPU families: no spills, 16 bytes a thread at a time.

The compiler runs in a process of its own: see ``prompt_sweep``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from peft_kernels.core import tiles
from tests.compile.cross import Report

pytest.importorskip("triton")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_compiles_without_spills_into_wide_accesses(family: str) -> None:
    from tests.compile.prompt_sweep import cases

    # float16 compiles to the code of bfloat16, here to the letter: nothing is multiplied.
    dtypes = ("bf16", "fp32")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile.prompt_sweep", family, *dtypes],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == [
        f"{dtype} {case.name}" for dtype in dtypes for case in cases(dtype)
    ]
    assert {case.kernel for case in cases("bf16")} == {
        "_prompt_forward_kernel",
        "_prompt_gradient_kernel",
        "_table_gradient_kernel",
    }
    unclean = {line["case"]: line["problems"] for line in lines if line["problems"]}
    assert not unclean


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 2}, "2 spill instructions"),
        ({"wide_loads": 3}, "3 16-byte loads instead of"),
        ({"wide_stores": 0}, "no 16-byte store"),
        ({"shared_kib": 99.5}, "KiB of shared memory"),
    ],
)
def test_a_report_complains(change: dict[str, int], complaint: str) -> None:
    from tests.compile.prompt_sweep import cases, problems

    case = cases("bf16")[0]
    clean = Report(64, 0, 0, 0, 1.0, 0, wide_loads=case.wide_loads, wide_stores=4)
    assert problems(case, clean, "sm_86") == []
    (found,) = problems(case, dataclasses.replace(clean, **change), "sm_86")
    assert complaint in found
