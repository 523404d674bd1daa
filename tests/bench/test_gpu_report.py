from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_report, gpu_timing
from bench.gpu_summary import summary
from bench.lora.cases import DRY_CASES, REPORT_CASES
from bench.measure import Timing
from bench.method import DIRECTIONS, GPU
from bench.methods import METHODS
from bench.rows import FAILED, TIMED, Row, plain
from bench.store import ROOT

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
                    case, direction, name, TIMED, "passed", PLAN, timing,
                    ratio_frozen=factor, ratio_eager=factor / 1.5, saved_bytes=2**18, launches=2,
                )  # fmt: skip
                rows.append({"item": f"{group} {case.name}", **plain(row)})
    return rows


def content(**changes: Any) -> dict[str, Any]:
    variants = {"triton:ticket": 1.02, "triton:recompute": 1.5, "triton:split": 1.1}
    whole: dict[str, Any] = {
        "dry_run": False,
        "machine": {
            "gpu": "Some GPU", "driver": "999.1", "torch": "2.11.0", "triton": "3.6.0",
            "commit": "0123456789abcdef", "dirty": False, "cpu": "Some CPU",
        },
        "build": {"ok": True, "ended": "exit status 0 after 9 s"},
        "tests": {
            "ok": True, "ended": "exit status 0 after 60 s", "failed": [],
            "counts": {"passed": 41, "skipped": 2},
        },
        "rows": _rows("main", FACTORS) + _rows("variants", variants),
        "crashed": {},
        "not_run": [],
    }  # fmt: skip
    return whole | changes


def test_summary_is_short_and_right() -> None:
    text, ok = summary(content())
    assert ok
    lines = text.splitlines()
    assert len(lines) <= 60
    first = REPORT_CASES[0].name
    (forward,) = [x for x in lines if x.startswith(first) and "fwd " in x and "ticket 128" in x]
    assert "1.020" in forward and "0.816" in forward and "0.680" in forward
    assert sum(line.startswith("geometric mean") for line in lines) == 2
    assert sum("split: library GEMM" in line for line in lines) == len(REPORT_CASES)
    assert any("recompute 1.500 / 4.500" in line for line in lines)
    assert re.search(r"gpu, forward: x frozen +<= 1\.05 +1\.020 +yes", text)
    assert "41 passed, 2 skipped" in text and "gates failed: 0" in text
    assert "Some GPU, driver 999.1; torch 2.11.0, triton 3.6.0, commit 0123456789" in text
    assert "DRY RUN" not in text


def test_summary_has_a_table_and_figures_of_every_method() -> None:
    rows = list(content()["rows"])
    for op in OTHERS:
        for case in METHODS[op].of_suite(GPU, reported=True):
            for direction in DIRECTIONS:
                for name, ms in (("eager", 2.3), ("peft", 4.6), ("fused", 1.0)):
                    timing = Timing(ms, ms, ms, ms, 9)
                    row = Row(
                        case, direction, name, TIMED, "passed", "triton", timing,
                        ratio_eager=ms / 2.3, roofline=0.8, launches=1, over="eager",
                    )  # fmt: skip
                    rows.append({"item": f"main {case.name}", **plain(row)})
    text, ok = summary(content(rows=rows))
    assert ok
    lines = text.splitlines()
    assert len(lines) <= 60 + 30 + 30 + 30
    assert sum(line.startswith("geometric mean") for line in lines) == 2 * 4
    (adapter,) = [x for x in lines if x.startswith("adapter 16384x8192 r128") and "fwd " in x]
    assert adapter.split()[-4:] == ["0.435", "1", "-", "triton"]
    assert re.search(r"gpu, forward: eager / ours +>= 2\.2 +2\.300 +yes", text)
    assert re.search(r"gpu, forward: roofline +>= 0\.85 +0\.800 +NO", text)
    assert re.search(r"B1 S64 P20 D4096 bf16, forward: eager / ours +>= 1 +2\.300 +yes", text)


def test_a_dry_run_times_the_triton_kernels_of_the_methods_asked_for(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    items = gpu_timing.items(dry=True, ops=OTHERS)
    assert gpu_timing.main([str(state), "100", *items]) == 0
    found = json.loads(state.read_text())
    assert found["done"] == items and found["running"] is None
    ours = [row for row in found["rows"] if row["provider"] == "fused"]
    assert {row["op"] for row in ours} == set(OTHERS)
    assert all(row["status"] == TIMED and row["plan"].startswith("triton") for row in ours)


def test_summary_says_what_failed_crashed_or_did_not_run() -> None:
    rows = _rows("main", FACTORS)
    broken = next(row for row in rows if row["provider"] == "fused")
    broken |= {"status": FAILED, "note": "y error 1.0 (bound 0.1)", "timing": None}
    crashed = {f"main {REPORT_CASES[1].name}": "killed by signal 11 after 3 s"}
    missing = [f"variants {REPORT_CASES[2].name}"]
    text, ok = summary(content(rows=rows, crashed=crashed, not_run=missing))
    assert not ok
    assert f"GATE FAILED  {REPORT_CASES[0].name}, forward, fused: y error 1.0" in text
    assert "CRASHED  main" in text and "killed by signal 11" in text
    assert f"not run, out of time: {missing[0]}" in text
    assert "gates failed: 1" in text


@pytest.mark.parametrize("changes", ["tests", "gate", "crash", "not run"])
def test_only_what_is_wrong_fails_the_report(changes: str) -> None:
    whole = content()
    if changes == "tests":
        whole["tests"] |= {"ok": False, "failed": [f"tests.x::test_{i}" for i in range(20)]}
    elif changes == "gate":
        whole["rows"][-1] |= {"status": FAILED, "timing": None}
    elif changes == "crash":
        whole["crashed"] = {"main x": "stopped after 9 s"}
    else:
        whole["not_run"] = ["variants x"]
    text, ok = summary(whole)
    assert ok == (changes == "not run")
    assert len(text.splitlines()) <= 60


def test_summary_of_nothing_measured_still_comes_out() -> None:
    text, ok = summary(content(rows=[], not_run=["main x"], dry_run=True))
    assert ok and "DRY RUN" in text and "not run, out of time: main x" in text


def test_an_unknown_stage_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("STAGE", "everything")
    assert gpu_report.main() == 2
    assert "stages are tests, timing" in capsys.readouterr().err


def test_items_are_every_case_before_any_variant() -> None:
    items = gpu_timing.items(dry=False)
    assert items[:8] == [f"main {case.name}" for case in REPORT_CASES]
    assert items[-8:] == [f"variants {case.name}" for case in REPORT_CASES]
    others = [name for name in items[8:-8] if name.split()[1] in OTHERS]
    assert others == items[8:-8] and len(others) == 8 + 7 + 3
    assert gpu_timing.items(dry=False, ops=["lora"]) == items[:8] + items[-8:]
    assert len(gpu_timing.items(dry=True, ops=["lora"])) == 2 * len(DRY_CASES)
    assert len(gpu_timing.items(dry=True)) == 2 * len(DRY_CASES) + 2 + 1 + 1


def test_outcomes_are_read_from_junit_or_from_the_log(tmp_path: Path) -> None:
    junit, log = tmp_path / "junit.xml", tmp_path / "tests.log"
    log.write_text(
        "tests/a.py::test_one PASSED [ 10%]\n"
        "tests/a.py::test_two[x] FAILED [ 20%]\n"
        "tests/a.py::test_three SKIPPED (no) [ 30%]\ntests/a.py::test_four "
    )
    counts, failed = gpu_report._outcomes(junit, log)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "unfinished": 1}
    assert failed == ["tests/a.py::test_two[x]", "tests/a.py::test_four did not end"]
    junit.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure/></testcase>'
        '<testcase classname="a" name="three"><skipped/></testcase>'
        '<testcase classname="a" name="four"><error/></testcase></testsuite></testsuites>'
    )
    counts, failed = gpu_report._outcomes(junit, log)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert failed == ["a::two", "a::four"]


def test_stages_see_this_tree_and_no_setting_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = gpu_report._environment(dry=False)
    assert not {"PYTEST_ADDOPTS", "PEFT_KERNELS_BACKEND", "TRITON_INTERPRET"} & set(found)
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert gpu_report._environment(dry=True)["TRITON_INTERPRET"] == "1"


def test_a_crash_costs_the_item_it_happened_at(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The second item kills its process; the third is timed by the next one."""
    script = tmp_path / "timing.py"
    script.write_text(
        "import json, os, sys\n"
        "path, seconds, *items = sys.argv[1:]\n"
        "state = {'done': [], 'rows': [], 'peaks': []}\n"
        "for state['running'] in items:\n"
        "    with open(path, 'w') as file: json.dump(state, file)\n"
        "    if state['running'] == 'main b': os._exit(9)\n"
        "    state['done'].append(state['running'])\n"
        "    state['rows'].append({'item': state['running']})\n"
        "state['running'] = None\n"
        "with open(path, 'w') as file: json.dump(state, file)\n"
    )
    monkeypatch.setattr(gpu_timing, "items", lambda dry, ops: ["main a", "main b", "main c"])
    report = gpu_report.Report(tmp_path, dry=True)
    stage = report.stage
    monkeypatch.setattr(
        report, "stage", lambda name, command, seconds: stage(name, [str(script), *command[2:]], 20)
    )
    gpu_report.measure(report)
    assert [row["item"] for row in report.content["rows"]] == ["main a", "main c"]
    assert list(report.content["crashed"]) == ["main b"]
    assert report.content["crashed"]["main b"].startswith("exit status 9")
    assert report.content["not_run"] == []
    assert (tmp_path / "report.json").is_file()


def test_shards_run_every_marked_test_once_and_tell_a_failure(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('i', range(5))\n"
        "def test_marked(i): assert i != 3\n"
        "def test_unmarked(): assert False\n"
    )
    (tests / "test_other.py").write_text("import no_such_module\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    report = gpu_report.Report(tmp_path / "out", dry=True)
    report.out.mkdir()
    gpu_report.test(report)
    found = report.content["tests"]
    assert found["shards"] == 2 and found["files"] == ["tests/test_some.py"]
    assert found["counts"] == {"passed": 4, "failed": 1}
    assert found["failed"] == ["tests.test_some::test_marked[3]"]
    assert not found["ok"]


def test_ending_the_report_ends_its_stages(tmp_path: Path) -> None:
    code = (
        "import signal, sys\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\nfrom bench import gpu_report\n"
        "signal.signal(signal.SIGTERM, gpu_report._terminated)\n"
        "report = gpu_report.Report(Path(sys.argv[1]), dry=True)\n"
        "stage = lambda n: report.stage(f's {n}', ['-c', 'import time; time.sleep(60)'], 60)\n"
        "with ThreadPoolExecutor(2) as pool: list(pool.map(stage, range(2)))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    started = [run.stdout.readline() for _ in range(2)]
    assert started == ["s 0 ...\n", "s 1 ...\n"]
    time.sleep(0.3)
    run.terminate()
    ended, _ = run.communicate(timeout=10)
    assert run.returncode == 128 + 15
    assert ended.count("killed by signal 9") == 2


def test_nothing_is_timed_when_the_time_is_up(tmp_path: Path) -> None:
    report = gpu_report.Report(tmp_path, dry=True)
    report.ends = 0.0
    gpu_report.measure(report)
    assert report.content["not_run"] == gpu_timing.items(dry=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "DRY_RUN"}
    done = subprocess.run(
        [sys.executable, "bench/gpu_report.py"], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"OUT": str(tmp_path / "out")}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "DRY_RUN=1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["lora", "nothing"]) == 2
    assert "methods are lora, adapter, prefix, prompt" in capsys.readouterr().err
