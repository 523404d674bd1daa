from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_report, gpu_timing
from bench.lora.cases import DRY_CASES, REPORT_CASES
from bench.method import BOTH, Provider
from bench.methods import METHODS
from bench.report import building, stage, timing
from bench.report.stage import Stage
from bench.rows import TIMED
from bench.store import ROOT

OTHERS = ["adapter", "prefix", "prompt"]  # than LoRA
MACHINE: dict[str, Any] = {
    "cpu": "Some CPU", "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789abcdef",
    "dirty": False,
}  # fmt: skip
DIES = (
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


def started(name: str, out: Path, seconds: float = 60.0) -> Stage:
    out.mkdir(parents=True, exist_ok=True)
    return Stage(name, out, True, seconds, MACHINE)


def runs_instead(script: Path, given: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stage run ``script`` with the arguments that it would give its module."""
    run = given.run

    def run_script(what: str, command: list[str], seconds: float, **named: Any) -> Any:
        return run(what, [str(script), *command[2:]], seconds, **named)

    monkeypatch.setattr(given, "run", run_script)


def found(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return content


class TestChoice:
    def test_no_name_is_every_stage_in_order_and_none_reaches_nine_minutes(self) -> None:
        every = gpu_report.chosen("", dry=False, limit_s=None)
        names = [name for name, _, _ in every]
        assert names == ["tests", *METHODS, "training", "sanitizer", "tune"]
        assert all(0 < seconds < 540 for _, _, seconds in every)

    def test_names_come_by_comma_or_space_and_timing_is_the_methods(self) -> None:
        names = [name for name, _, _ in gpu_report.chosen("tune, prompt  timing", False, None)]
        assert names == ["tune", "prompt", "lora", "adapter", "prefix"]

    def test_a_limit_holds_for_each_stage_and_a_name_may_bring_its_own(self) -> None:
        taken = {name: s for name, _, s in gpu_report.chosen("tests lora:70 tune:9", False, 90.0)}
        assert taken == {"tests": 90.0, "lora": 70.0, "tune": 9.0}

    @pytest.mark.parametrize(
        ("variable", "asked", "said"),
        [
            ("STAGE", "everything", "stages are tests, "),
            ("STAGE", "lora tests,x", "stages are tests, "),
            ("STAGE", "lora:soon", "seconds must be a number above 0, got lora:soon"),
            ("STAGE", "lora:-5", "seconds must be a number above 0, got lora:-5"),
            ("STAGE", "lora:nan", "seconds must be a number above 0, got lora:nan"),
            ("LIMIT_S", "0", "seconds must be a number above 0, got LIMIT_S=0"),
            ("OUT", "/dev/null/out", "nothing can be written to /dev/null/out: Not a directory"),
        ],
    )
    def test_what_is_unknown_is_refused(
        self, variable: str, asked: str, said: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.setenv("DRY_RUN", "1")
        monkeypatch.setenv("STAGE", "prompt")
        monkeypatch.setenv(variable, asked)
        assert gpu_report.main() == 2
        assert capsys.readouterr().err.startswith(f"gpu-report: {said}")


def dry_report(monkeypatch: pytest.MonkeyPatch, out: Path, **runs: Any) -> int:
    """Run the report with ``runs`` as its stages."""
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.delenv("STAGE", raising=False)
    monkeypatch.setattr(building, "why_build", lambda dry: None)
    monkeypatch.setattr(gpu_report, "stages", lambda dry: {k: (v, 30.0) for k, v in runs.items()})
    return gpu_report.main()


def well(each: Stage) -> None:
    each.end(True, "fine")


def test_a_stage_that_dies_leaves_the_others_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(each: Stage) -> None:
        each.add(rows=[1])
        raise MemoryError("no room")

    assert dry_report(monkeypatch, tmp_path, first=well, second=dies, third=well) == 1
    names = [path.name for path in sorted(tmp_path.iterdir())]
    stages = ("first", "second", "third")
    assert names == [f"{name}.{kind}" for name in stages for kind in ("json", "log")]
    assert found(tmp_path, "second")["rows"] == [1]
    assert "MemoryError" in (tmp_path / "second.log").read_text()
    last = capsys.readouterr().out.splitlines()[-4:]
    assert last[0].split()[:2] == ["first", "ok"]
    assert last[1].startswith("second    NOT OK") and "died: MemoryError: no room" in last[1]
    assert last[2].split()[:2] == ["third", "ok"]


def test_only_what_is_wrong_fails_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry_report(monkeypatch, tmp_path, first=well, second=well) == 0
    assert found(tmp_path, "first")["ok"] and found(tmp_path, "first")["complete"]
    # One that returns without a verdict has not passed.
    assert dry_report(monkeypatch, tmp_path, first=well, second=lambda each: None) == 1


def test_a_long_log_keeps_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MOST_LOG_BYTES", 800)
    each = started("some", tmp_path)
    each.log.write_text("begin" + "x" * 5000 + "end")
    each.end(True, "fine")
    text = each.log.read_text()
    assert len(text) < 900 and text.startswith("begin") and text.endswith("end") and "cut" in text


def test_a_dry_run_times_the_triton_kernels_of_the_methods_asked_for(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    items = gpu_timing.items(dry=True, ops=OTHERS)
    # A process of its own: an item that takes too long ends it.
    command = [sys.executable, "-m", "bench.gpu_timing", str(state), "600", *items]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    content = json.loads(state.read_text())
    assert content["done"] == items and content["running"] is None
    ours = [row for row in content["rows"] if row["provider"] == "fused"]
    assert {row["op"] for row in ours} == set(OTHERS)
    assert all(row["status"] == TIMED and row["plan"].startswith("triton") for row in ours)


def test_preparing_runs_every_provider_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that raises is told by its gate, later: the others are still prepared."""
    (item,) = gpu_timing.items(dry=True, ops=["prompt"])
    providers = METHODS["prompt"].gpu["main"]
    called = []

    def call_of(provider: Provider, problem: Any, direction: str) -> Callable[[], None]:
        def call() -> None:
            called.append((provider.name, direction))
            raise RuntimeError("broken")

        return call

    monkeypatch.setattr(gpu_timing, "call_of", call_of)
    assert gpu_timing.main(["--prepare", item]) == 0
    names = [name for name, _ in called]
    assert "eager" in names and "fused" in names and len(names) == len(providers)
    assert {direction for _, direction in called} == {BOTH}
    assert f"ran fused  {item}" in capsys.readouterr().out


def test_a_stage_compiles_side_by_side_before_it_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepares = "if sys.argv[1] == '--prepare': sys.exit(print('compiled', sys.argv[2]))"
    (tmp_path / "timing.py").write_text(f"import sys\n{prepares}\n{DIES}")
    monkeypatch.setattr(gpu_timing, "items", lambda dry, ops: ["main a", "main c", "main d"])
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    each = started("lora", tmp_path / "out")
    each.dry = False
    runs_instead(tmp_path / "timing.py", each, monkeypatch)
    monkeypatch.setattr(timing, "timing_text", lambda content: ("", True))
    timing.run(each)
    log = each.log.read_text()
    assert all(f"compiled {item}\n" in log for item in ("main a", "main c", "main d"))
    assert each.content["done"] == ["main a", "main c", "main d"] and each.content["ok"]
    assert "lora: 3 of 3 compiled in " in capsys.readouterr().out


def test_items_are_every_case_before_any_variant() -> None:
    items = gpu_timing.items(dry=False)
    assert items[:8] == [f"main {case.name}" for case in REPORT_CASES]
    assert items[-8:] == [f"variants {case.name}" for case in REPORT_CASES]
    others = [name for name in items[8:-8] if name.split()[1] in OTHERS]
    assert others == items[8:-8] and len(others) == 8 + 7 + 3
    assert gpu_timing.items(dry=False, ops=["lora"]) == items[:8] + items[-8:]
    assert len(gpu_timing.items(dry=True, ops=["lora"])) == 2 * len(DRY_CASES)
    assert len(gpu_timing.items(dry=True)) == 2 * len(DRY_CASES) + 2 + 1 + 1


def test_a_crash_costs_the_item_it_happened_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second item kills its process; the third is timed by the next one."""
    (tmp_path / "timing.py").write_text(DIES)
    monkeypatch.setattr(gpu_timing, "items", lambda dry, ops: ["main a", "main b", "main c"])
    each = started("lora", tmp_path / "out")
    runs_instead(tmp_path / "timing.py", each, monkeypatch)
    monkeypatch.setattr(timing, "timing_text", lambda content: ("", not content["crashed"]))
    timing.run(each)
    content = found(tmp_path / "out", "lora")
    assert [row["item"] for row in content["rows"]] == ["main a", "main c"]
    assert list(content["crashed"]) == ["main b"]
    assert content["crashed"]["main b"].startswith("exit status 9")
    assert content["not_run"] == [] and not content["ok"]
    assert sorted(path.name for path in each.out.iterdir()) == ["lora.json", "lora.log"]


def test_an_item_that_hangs_ends_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from bench import gpu_timing\n"
        "gpu_timing.ITEM_S = 0.5\n"
        "gpu_timing._measure = lambda *given: time.sleep(60)\n"
        "sys.exit(gpu_timing.main([sys.argv[1], '100', 'main a', 'main b']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "state.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "Timeout" in done.stderr
    assert json.loads((tmp_path / "state.json").read_text())["running"] == "main a"


def test_items_are_begun_while_one_like_those_before_still_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first also starts the libraries: 10 s, then 4 each; a fifth would not fit in 25."""
    clock = [0.0]

    def measure(item: str, *given: Any) -> list[Any]:
        clock[0] += 10.0 if item == "main 0" else 4.0
        return []

    monkeypatch.setattr(gpu_timing, "_measure", measure)
    monkeypatch.setattr(gpu_timing.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_timing, "watchdog", contextlib.nullcontext)
    state = tmp_path / "state.json"
    assert gpu_timing.main([str(state), "25", *(f"main {number}" for number in range(9))]) == 0
    assert json.loads(state.read_text())["done"] == ["main 0", "main 1", "main 2", "main 3"]


def test_nothing_is_timed_when_the_time_is_up(tmp_path: Path) -> None:
    each = started("prefix", tmp_path, seconds=0.0)
    timing.run(each)
    assert each.content["not_run"] == gpu_timing.items(dry=True, ops=["prefix"])
    assert not each.content["ok"]


def test_stages_see_this_tree_and_no_setting_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    monkeypatch.setenv("PEFT_KERNELS_COMMIT", "abc")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = stage.environment(dry=False)
    assert not {"PYTEST_ADDOPTS", "PEFT_KERNELS_BACKEND", "TRITON_INTERPRET"} & set(given)
    assert given["PEFT_KERNELS_COMMIT"] == "abc"
    assert given["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert stage.environment(dry=True)["TRITON_INTERPRET"] == "1"


def test_ending_the_report_ends_its_stages(tmp_path: Path) -> None:
    code = (
        "import signal, sys\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\nfrom bench import gpu_report\n"
        "from bench.report.stage import Stage\n"
        "signal.signal(signal.SIGTERM, gpu_report._terminated)\n"
        "stage = Stage('s', Path(sys.argv[1]), True, 60, {})\n"
        "child = 'import sys, time; open(sys.argv[1], \"w\"); time.sleep(60)'\n"
        "run = lambda n: stage.run(f's {n}', ['-c', child, f'{sys.argv[1]}/{n}'], 60)\n"
        "with ThreadPoolExecutor(2) as pool: list(pool.map(run, range(2)))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    ends = time.monotonic() + 60
    while not all((tmp_path / str(n)).exists() for n in range(2)) and time.monotonic() < ends:
        time.sleep(0.1)
    time.sleep(0.3)
    run.terminate()
    ended, _ = run.communicate(timeout=10)
    assert run.returncode == 128 + 15
    assert ended.count("killed by signal 9") == 2


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
