from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import store
from bench.stages import run_stage
from bench.store import ROOT

MACHINE = {
    "date": "2031-02-03T04:05:06+00:00", "commit": "0123456789abcdef", "dirty": False,
    "cpu": "Some CPU (TM) 9000, 2 logical cores, torch threads: 2", "device": "cpu",
}  # fmt: skip


def test_file_names_hold_date_commit_and_device() -> None:
    assert store.file_stem(MACHINE) == "20310203T040506-0123456789-some-cpu-tm-9000"
    gpu = {**MACHINE, "dirty": True, "gpu": "NVIDIA H100 80GB HBM3"}
    assert store.file_stem(gpu) == "20310203T040506-0123456789-dirty-nvidia-h100-80gb-hbm3"
    assert "no-commit" in store.file_stem({**MACHINE, "commit": None})


def test_machine_says_what_a_number_depends_on() -> None:
    found = store.machine(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert set(found) >= {"cpu", "triton", "numpy", "commit", "dirty", "threads", "date"}
    json.dumps(found, allow_nan=False)


def test_a_copy_without_git_has_the_commit_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_git", lambda *arguments: None)
    for name in ("COMMIT", "PEFT_KERNELS_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    assert store.machine(torch.device("cpu"))["commit"] is None
    monkeypatch.setenv("COMMIT", "abc")
    assert store.machine(torch.device("cpu"))["commit"] == "abc"
    monkeypatch.setenv("PEFT_KERNELS_COMMIT", "def")
    assert store.machine(torch.device("cpu"))["commit"] == "def"


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    paths = [store.write_new(tmp_path / "new", "same", {"run": run}) for run in range(3)]
    assert [path.name for path in paths] == ["same.json", "same-2.json", "same-3.json"]
    assert [json.loads(path.read_text())["run"] for path in paths] == [0, 1, 2]


def test_nothing_is_left_of_content_that_cannot_be_written(tmp_path: Path) -> None:
    for bad in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            store.write_new(tmp_path, "bad", {"value": bad})
        with pytest.raises((TypeError, ValueError)):
            store.replace(tmp_path / "bad.json", {"value": bad})
    assert list(tmp_path.iterdir()) == []


def test_replace_keeps_the_old_file_when_the_new_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    store.replace(target, {"value": 1})
    with pytest.raises(TypeError):
        store.replace(target, {"value": object()})
    assert json.loads(target.read_text()) == {"value": 1}
    store.replace(target, {"value": 2})
    assert json.loads(target.read_text()) == {"value": 2}
    assert len(list(tmp_path.iterdir())) == 1


class TestStages:
    def run(self, tmp_path: Path, code: str, seconds: float, patience_s: float = 0.0):  # type: ignore[no-untyped-def]
        command = [sys.executable, "-c", code]
        return run_stage(command, tmp_path / "log", seconds, {"A": "b"}, tmp_path, patience_s)

    def test_output_environment_and_status_are_kept(self, tmp_path: Path) -> None:
        code = "import os, sys; print(os.environ['A'], flush=True); sys.exit(7)"
        done = self.run(tmp_path, code, 20)
        assert done.status == 7 and str(done).startswith("exit status 7 after")
        assert (tmp_path / "log").read_text() == "b\n"

    def test_a_signal_is_told_from_an_exit(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "import os; os.kill(os.getpid(), 11)", 20)
        assert done.status == -signal.SIGSEGV and "killed by signal 11" in str(done)

    def test_time_ends_the_command_and_what_it_started(self, tmp_path: Path) -> None:
        child = "import time, pathlib; time.sleep(3); pathlib.Path('late').touch()"
        code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
        start = time.monotonic()
        done = self.run(tmp_path, code + "; time.sleep(60)", 1.0)
        assert done.status is None and "stopped after 1 s" in str(done)
        assert time.monotonic() - start < 3
        time.sleep(max(0.0, start + 4.5 - time.monotonic()))
        assert not (tmp_path / "late").exists()

    def test_an_interrupted_command_can_write_its_results(self, tmp_path: Path) -> None:
        code = (
            "import time\ntry: time.sleep(60)\n"
            "except KeyboardInterrupt: open('results', 'w').write('whole')"
        )
        done = self.run(tmp_path, code, 12.0, patience_s=10.0)
        assert done.status is None and done.seconds < 10
        assert (tmp_path / "results").read_text() == "whole"


def quick_run(out: Path, *options: str, by: Sequence[str] = ("-m", "peft_kernels", "bench")):  # type: ignore[no-untyped-def]
    # One thread: on a busy machine a second one is mostly waited for.
    return subprocess.Popen(
        [sys.executable, *by, "--quick", "--output", str(out), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_quick_run_end_to_end(tmp_path: Path) -> None:
    run = quick_run(tmp_path, "--suite", "all", "--seconds", "0.02")
    printed, progress = run.communicate(timeout=120)
    assert run.returncode == 0, progress
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["quick"] is True
    assert content["pinned"]["OMP_PROC_BIND"] == "true"
    by_suite: dict[str, list[dict[str, object]]] = {}
    for row in content["rows"]:
        by_suite.setdefault(row["case"]["suite"], []).append(row)
    assert {"cpu", "host", "memory"} <= set(by_suite)
    timed = by_suite["cpu"] + by_suite["host"]
    # Cases, directions, providers without torch.compile.
    rows_of = {
        "lora": (8 + 2) * 2 * 5, "adapter": (10 + 1) * 2 * 2, "prefix": (4 + 1) * 2 * 2,
        "prompt": (6 + 1) * 2 * 3,
    }  # fmt: skip
    assert Counter(row["op"] for row in timed) == rows_of
    assert all(row["status"] == "timed" and "passed" in str(row["note"]) for row in timed)
    saved = {
        row["case"]["name"]: row["saved_bytes"]
        for row in by_suite["memory"]
        if row["provider"] == "fused"
    }
    # LoRA's s; the adapter's pre-activations, whatever the activation; a seed under dropout; out
    # and lse of prefix attention.
    low = 24 * 8 * 2
    assert sorted(saved.values()) == [low, low, low + 8, low + 8, 2 * 4 * 21 * (16 * 2 + 4)]
    targets = {(each["op"], each["target"]) for each in content["figures"]}
    assert ("lora", "saved for backward beyond x: MiB") in targets
    assert {op for op, _ in targets} == set(rows_of)
    assert len(content["host_profile"]) == len(content["host"]) == 4 + 3 * 2
    words = ("x frozen", "roofline", "Figures", "Where the host's time goes", "Host time", "calls")
    words += ("third parties: peft ",)
    assert all(each in printed for each in (*words, str(path)))
    figures = {tmp_path / f"{path.stem}-{each}.png" for each in ("speedup", "roofline", "saved")}
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in figures)
    assert set(tmp_path.iterdir()) == {path, *figures}


def test_a_killed_run_leaves_no_file(tmp_path: Path) -> None:
    run = quick_run(tmp_path, by=("bench/run.py",))
    assert run.stderr is not None
    first = run.stderr.readline()
    run.kill()
    run.communicate()
    assert first.startswith("[1/38] cpu: quick 2048x2048x2048 fp32 p0")
    assert list(tmp_path.iterdir()) == []


def test_run_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    for options in (
        ("--cases", "no such case"), ("--op", "no such op"), ("--baseline", "no such baseline"),
        ("--seconds", "-1"), ("--output", str(tmp_path / "file" / "folder")),
    ):  # fmt: skip
        (tmp_path / "file").touch()
        run = quick_run(tmp_path, *options)
        _, error = run.communicate(timeout=60)
        assert run.returncode == 2 and options[1] in error and "Traceback" not in error
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("op", ["lora", "adapter", "prefix", "prompt"])
def test_op_measures_that_method_alone(op: str, tmp_path: Path) -> None:
    run = quick_run(tmp_path, "--op", op, "--suite", "cpu", "--seconds", "0.01")
    printed, progress = run.communicate(timeout=120)
    assert run.returncode == 0, progress
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert {row["op"] for row in content["rows"]} == {op}
    assert {each["op"] for each in content["figures"]} == {op}
    assert f"\n{op}\n" in printed
