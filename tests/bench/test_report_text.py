from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bench.lora.cases import REPORT_CASES
from bench.measure import Timing
from bench.method import DIRECTIONS, GPU
from bench.methods import METHODS
from bench.report import text
from bench.report.text import ending, timing_text
from bench.rows import FAILED, TIMED, Row, plain

PLAN = "triton: forward ticket 128x256x64, 8 warps, 3 stages; backward split: library GEMM"
FACTORS = {"fused": 1.02, "frozen": 1.0, "factored": 1.25, "eager": 1.5}
OTHERS = ["adapter", "prefix", "prompt"]  # than LoRA


def _rows(group: str, names: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for case in REPORT_CASES:
        for direction in DIRECTIONS:
            for name, factor in names.items():
                time_ms = factor * (3.0 if "backward" in direction else 1.0)
                timing = Timing(time_ms, time_ms, time_ms, time_ms, 9)
                row = Row(
                    case, direction, name, TIMED, "passed", PLAN, timing, wall=timing,
                    ratio_frozen=factor, ratio_eager=factor / 1.5, roofline=0.71,
                    saved_bytes=2**18, launches=2,
                )  # fmt: skip
                rows.append({"item": f"{group} {case.name}", **plain(row)})
    return rows


def content(**changes: Any) -> dict[str, Any]:
    variants = {"triton:ticket": 1.02, "triton:recompute": 1.5, "triton:split": 1.1}
    whole: dict[str, Any] = {
        "stage": "lora", "rows": _rows("main", FACTORS) + _rows("variants", variants),
        "crashed": {}, "not_run": [],
    }  # fmt: skip
    return whole | changes


def test_the_table_is_short_and_right() -> None:
    printed, ok = timing_text(content())
    assert ok
    lines = printed.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 180
    first = REPORT_CASES[0].name
    (forward,) = [x for x in lines if x.startswith(first) and "fwd " in x and "ticket 128" in x]
    assert "1.020" in forward and "0.816" in forward and "0.680" in forward
    assert forward.split()[6:8] == ["-", "1.020"] and "71%" in forward
    assert sum(line.startswith("geometric mean") for line in lines) == 2
    assert sum("split: library GEMM" in line for line in lines) == len(REPORT_CASES)
    assert any("recompute 1.500 / 4.500" in line for line in lines)
    assert re.search(r"gpu, forward: x frozen +<= 1\.05 +1\.020 +yes", printed)


def test_a_baseline_that_no_case_could_run_has_no_column() -> None:
    names = {name: factor for name, factor in FACTORS.items() if name != "factored"}
    header = timing_text(content(rows=_rows("main", names)))[0].splitlines()[0]
    assert "x factored" in timing_text(content())[0].splitlines()[0]
    assert "x frozen" in header and "x factored" not in header


def test_what_is_predicted_stands_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(predicted_ms=lambda row: 7.5 if "M16" in row.case.name else None)
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "bench.model", model)
    lines = timing_text(content())[0].splitlines()
    shown = [line for line in lines if "7.500" in line]
    assert len(shown) == 2 and all("M16" in line for line in shown)


@pytest.mark.parametrize("op", OTHERS)
def test_every_method_has_a_table_and_its_figures(op: str) -> None:
    rows = []
    for case in METHODS[op].of_suite(GPU, reported=True):
        for direction in DIRECTIONS:
            for name, ms in (("eager", 2.3), ("peft", 4.6), ("fused", 1.0)):
                timing = Timing(ms, ms, ms, ms, 9)
                row = Row(
                    case, direction, name, TIMED, "passed", "triton", timing,
                    ratio_eager=ms / 2.3, roofline=0.8, launches=1, over="eager",
                )  # fmt: skip
                rows.append({"item": f"main {case.name}", **plain(row)})
    printed, ok = timing_text(content(stage=op, rows=rows))
    assert ok
    lines = printed.splitlines()
    assert len(lines) <= 30
    assert sum(line.startswith("geometric mean") for line in lines) == 2
    if op == "adapter":
        (line,) = [x for x in lines if x.startswith("adapter 16384x8192 r128") and "fwd " in x]
        assert line.split()[-4:] == ["0.435", "1", "-", "triton"]
        assert re.search(r"gpu, forward: eager / ours +>= 2\.2 +2\.300 +yes", printed)
        assert re.search(r"gpu, forward: roofline +>= 0\.85 +0\.800 +NO", printed)
    if op == "prompt":
        wanted = r"B1 S64 P20 D4096 bf16, forward: eager / ours +>= 1 +2\.300 +yes"
        assert re.search(wanted, printed)


def test_what_failed_crashed_or_did_not_run_is_said() -> None:
    rows = _rows("main", FACTORS)
    broken = next(row for row in rows if row["provider"] == "fused")
    broken |= {"status": FAILED, "note": "y error 1.0 (bound 0.1)", "timing": None}
    crashed = {f"main {REPORT_CASES[1].name}": "killed by signal 11 after 3 s"}
    missing = [f"variants {REPORT_CASES[2].name}"]
    printed, ok = timing_text(content(rows=rows, crashed=crashed, not_run=missing))
    assert not ok
    assert f"GATE FAILED  {REPORT_CASES[0].name}, forward, fused: y error 1.0" in printed
    assert "CRASHED  main" in printed and "killed by signal 11" in printed
    assert f"not run, out of time: {missing[0]}" in printed


@pytest.mark.parametrize("changes", ["gate", "crash", "not run"])
def test_a_failed_gate_and_a_crash_fail_the_stage(changes: str) -> None:
    whole = content()
    if changes == "gate":
        whole["rows"][-1] |= {"status": FAILED, "timing": None}
    elif changes == "crash":
        whole["crashed"] = {"main x": "stopped after 9 s"}
    else:
        whole["not_run"] = ["variants x"]
    printed, ok = timing_text(whole)
    assert ok == (changes == "not run")
    assert len(printed.splitlines()) <= 60


def test_a_table_of_nothing_measured_still_comes_out() -> None:
    printed, ok = timing_text(content(rows=[], not_run=["main x"]))
    assert ok and "not run, out of time: main x" in printed


def test_the_last_lines_name_every_stage_and_the_machine() -> None:
    machine = {
        "gpu": "Some GPU", "driver": "999.1", "torch": "2.11.0", "triton": "3.6.0",
        "commit": "0123456789abcdef", "dirty": False, "cpu": "Some CPU",
    }  # fmt: skip
    stages = [
        {"stage": "lora", "ok": True, "ended": "16 items timed", "seconds": 61.2},
        {"stage": "tests", "ok": False, "ended": "killed by signal 11"},
    ]
    lines = ending(stages, machine, dry=False).splitlines()
    assert "61 s  16 items timed" in lines[2] and " ok " in lines[2]
    assert "NOT OK" in lines[3] and "killed by signal 11" in lines[3]
    assert lines[4] == ("Some GPU, driver 999.1; torch 2.11.0, triton 3.6.0, commit 0123456789")
    assert "DRY RUN" in ending(stages, machine, dry=True)
