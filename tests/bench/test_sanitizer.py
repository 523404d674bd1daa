from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import sanitizer_run
from bench.report import sanitizer
from bench.report.stage import Stage
from bench.sanitizer_run import KERNELS, PLANTED
from bench.store import ROOT
from peft_kernels.core import cuda_library, triton_runtime

MEMCHECK = """========= COMPUTE-SANITIZER
ran triton:drop bfloat16: _drop_kernel
========= Invalid __global__ write of size 4 bytes
=========     at _drop_kernel+0x50
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _x_kernel+0x10
=========     and Read access at _x_kernel+0x90 [64 hazards]
ran triton:drop float32: _drop_kernel
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
BROKEN = """========= COMPUTE-SANITIZER
========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.
========= Error: process didn't terminate successfully
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "ran triton:drop float32: _drop_kernel\n========= ERROR SUMMARY: 0 errors\n"


def test_errors_are_read_from_the_tools_summaries() -> None:
    found = sanitizer.read("memcheck", "triton:drop", MEMCHECK, "")
    assert found["errors"] == 3 and found["ran"] == ["triton:drop bfloat16"]
    assert found["launched"] == ["_drop_kernel"]
    assert found["first"] == ["Invalid __global__ write of size 4 bytes at _drop_kernel+0x50"]
    found = sanitizer.read("racecheck", "triton:drop", RACECHECK, "")
    assert found["errors"] == 1 and "Race reported" in found["first"][0]
    found = sanitizer.read("racecheck", "triton:drop", CLEAN.replace("ERROR", "RACECHECK"), "")
    assert found["errors"] == 0 and found["first"] == []


@pytest.mark.parametrize(
    ("name", "text", "ended", "wrong"),
    [
        ("triton:drop", CLEAN, "", None),
        ("triton:drop", MEMCHECK, "", "3 errors"),
        ("triton:drop", CLEAN, "exit status 1 after 2 s", "exit status 1"),
        ("triton:drop", "Device not supported", "stopped after 9 s", "no result: stopped"),
        ("triton:drop", "========= ERROR SUMMARY: 0 errors", "", "nothing ran"),
        ("triton:drop", BROKEN, "exit status 6", "no result: Internal Sanitizer Error: The"),
        ("planted:global", MEMCHECK, "exit status 1", None),
        ("planted:global", CLEAN, "", "NOT FOUND"),
        ("planted:race", "", "", "no result"),
    ],
)
def test_a_run_is_right_only_if_the_tool_saw_it_and_found_nothing(
    name: str, text: str, ended: str, wrong: str | None
) -> None:
    found = sanitizer.bad(sanitizer.read("memcheck", name, text, ended))
    assert found is None if wrong is None else wrong in str(found)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The stage of a machine with a GPU, a library and three kernels."""
    three = dict.fromkeys(("triton:drop", "triton:prompt", "cuda:prompt"))
    monkeypatch.setattr(sanitizer_run, "KERNELS", three)
    monkeypatch.setattr(cuda_library, "build_info", lambda: {"cuda_archs": ["90a"]})
    return Stage("sanitizer", tmp_path, False, 60.0, {})


def tool(folder: Path, script: str) -> str:
    path = folder / "compute-sanitizer"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


FAKE = """
which=$2
for last; do :; done
case "$*" in
  *planted*) echo "========= ERROR SUMMARY: 1 error"; exit 1;;
  *triton:prompt*) [ $which = racecheck ] && kill -9 $$;;
esac
echo "ran $last float32: _some_kernel"
[ $PYTORCH_NO_CUDA_MEMORY_CACHING = 1 ] && echo "========= ERROR SUMMARY: 0 errors"
"""


def test_every_kernel_runs_under_both_tools_and_a_crash_costs_itself(
    given: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    path = tool(tmp_path, FAKE)
    monkeypatch.setattr(sanitizer, "find", lambda: path)
    sanitizer.run(given)
    runs = {(each["tool"], each["name"]): each for each in given.content["runs"]}
    assert len(runs) == 2 + 2 * 3
    wrong = {key: sanitizer.bad(each) for key, each in runs.items() if sanitizer.bad(each)}
    assert list(wrong) == [("racecheck", "triton:prompt")]
    assert not given.content["ok"]
    printed = capsys.readouterr().out
    assert "memcheck: 0 errors; 3 runs ended" in printed
    assert "racecheck triton:prompt: no result: killed by signal 9" in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"compute-sanitizer", "sanitizer.json", "sanitizer.log"}


def test_a_tool_that_finds_nothing_wrong_with_what_is_wrong_does_not_pass(
    given: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    path = tool(
        tmp_path, 'for last; do :; done; echo "ran $last float32: "; echo "ERROR SUMMARY: 0 errors"'
    )
    monkeypatch.setattr(sanitizer, "find", lambda: path)
    sanitizer.run(given)
    assert not given.content["ok"]
    assert capsys.readouterr().out.count("the error that was planted is NOT FOUND") == len(PLANTED)


def test_without_the_tool_or_the_library_nothing_passes(
    given: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    sanitizer.run(given)
    assert not given.content["ok"]
    assert "compute-sanitizer not found" in capsys.readouterr().out
    path = tool(tmp_path, FAKE.replace("kill -9 $$", "true"))
    monkeypatch.setattr(sanitizer, "find", lambda: path)
    monkeypatch.setattr(cuda_library, "build_info", lambda: None)
    sanitizer.run(given)
    assert not given.content["ok"] and given.content["missing"] == [
        "cuda:prompt: the CUDA library is not built"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of the interpreter")
@pytest.mark.skipif(triton_runtime.import_problem() is not None, reason="needs Triton")
def test_together_they_launch_every_triton_kernel_of_the_package() -> None:
    launched = set()
    for name in KERNELS:
        # The other variant of prefix attention launches the same.
        if name.startswith("triton:") and name != "triton:prefix-split":
            launched |= set(sanitizer_run.run(name, "float32", torch.device("cpu")))
    package = Path(sanitizer_run.launches.__file__).parent.parent
    text = "".join(path.read_text() for path in sorted(package.rglob("*.py")))
    kernels = re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (_\w+_kernel)\(", text)
    assert launched == set(kernels) and len(kernels) > 15
    assert all(re.match(sanitizer_run.KERNEL_NAMES, each) for each in kernels)


def test_what_is_not_printed_is_counted_and_no_smaller_number_hides_it() -> None:
    more = "========= ERROR SUMMARY: 2 errors were not printed. Use --print-limit to see them\n"
    assert sanitizer.read("memcheck", "triton:drop", MEMCHECK + more, "")["errors"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel itself is run")
def test_the_planted_kernel_compiles_under_a_name_that_is_watched(tmp_path: Path) -> None:
    code = (
        "from triton import compile\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "from bench.planted import _planted_global_kernel as kernel\n"
        "source = ASTSource(kernel, {'x_ptr': '*fp32', 'N': 'i32'}, {})\n"
        "print(compile(source, target=GPUTarget('cuda', 90, 32)).metadata.name)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "_planted_global_kernel"
    assert re.match(sanitizer_run.KERNEL_NAMES, done.stdout)
