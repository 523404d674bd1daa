"""``python -m peft_kernels``: a report on any machine, an answer to any input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels import __main__ as command_line
from peft_kernels import __version__, environment

SECTIONS = ("versions", "devices", "extension", "cuda library", "environment", "backends")
ROOT = Path(__file__).resolve().parent.parent
# Runs before anything is imported. Absent: no finder knows the module. Broken: it fails to load.
ABSENT = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = (
    lambda name, *rest: None if name == {name!r} else find(name, *rest)
)
"""
BROKEN = """
import importlib.abc, importlib.util, sys

class Loader(importlib.abc.Loader):
    def exec_module(self, module):
        raise {error}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, Loader()) if name == {name!r} else None

sys.meta_path.insert(0, Finder())
"""
ENV = "from peft_kernels.__main__ import main\nsys.exit(main(['env', '--json']))"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # The interpreter mode of the tests would hide what a user sees.
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=kept | variables,
        timeout=120,
        check=False,
    )


def env_after(sabotage: str) -> dict[str, dict[str, Any]]:
    done = run(sabotage + ENV)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert tuple(report) == SECTIONS
    return report


def test_importing_the_package_imports_neither_torch_nor_triton_nor_the_extension() -> None:
    done = run(
        """
        import sys
        import peft_kernels
        assert "lora_linear" in dir(peft_kernels)
        heavy = {"torch", "triton", "peft_kernels._C"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    assert done.returncode == 0, done.stderr


def test_importing_every_public_name_leaves_triton_alone() -> None:
    done = run(
        """
        import sys
        import torch
        before = "triton" in sys.modules
        import peft_kernels
        for name in peft_kernels.__all__:
            getattr(peft_kernels, name)
        assert before or "triton" not in sys.modules
        """
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    import peft_kernels

    with pytest.raises(AttributeError, match="no attribute 'lora_liner'"):
        _ = peft_kernels.lora_liner


def test_lora_linear_works_where_triton_is_absent() -> None:
    done = run(
        ABSENT.format(name="triton")
        + textwrap.dedent(
            """
            import torch
            from peft_kernels import lora_linear
            x, w = torch.randn(3, 8), torch.randn(5, 8)
            a, b = torch.randn(2, 8, requires_grad=True), torch.randn(5, 2, requires_grad=True)
            y = lora_linear(x, w, a, b, scale=2.0)
            torch.testing.assert_close(y, x @ w.T + 2.0 * x @ a.T @ b.T)
            y.sum().backward()
            assert a.grad.abs().sum() > 0
            """
        )
    )
    assert done.returncode == 0, done.stderr


def test_env_says_that_triton_is_absent() -> None:
    report = env_after(ABSENT.format(name="triton"))
    assert "fails to import" in report["versions"]["triton"]
    against = report["backends"]["lora_linear on cpu"]["float32"]["not triton"]
    assert "Triton is not installed" in against


def test_env_survives_a_torch_that_does_not_load() -> None:
    error = "OSError('libtorch_cpu.so: file too short')"
    report = env_after(BROKEN.format(name="torch", error=error))
    assert "libtorch_cpu.so: file too short" in report["versions"]["torch"]
    assert "libtorch_cpu.so: file too short" in json.dumps(report["backends"])
    assert __version__ in report["versions"]["peft_kernels"]


def test_env_shows_why_the_extension_does_not_load() -> None:
    error = "ImportError('undefined symbol: aoti_torch_mm')"
    report = env_after(BROKEN.format(name="peft_kernels._C", error=error))
    assert "undefined symbol: aoti_torch_mm" in json.dumps(report["extension"])
    on_cpu = report["backends"]["lora_linear on cpu"]["float32"]
    assert on_cpu["runs on"].startswith("reference")
    assert "undefined symbol: aoti_torch_mm" in on_cpu["not cpp"]


def test_env_survives_cuda_calls_that_raise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> bool:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert command_line.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "CUDA driver initialization failed" in printed
    assert "lora_linear on cpu" in printed


def test_env_survives_even_a_system_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: object) -> None:
        raise SystemExit("left")

    monkeypatch.setitem(environment.EXPLAINED, "lora_linear", broken)
    served = environment.report()["backends"]["lora_linear on cpu"]["float32"]
    assert served == {"failed": "error: SystemExit: left"}


def test_env_shows_a_demand_that_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "fastest")
    text = environment.render(environment.report())
    assert "PEFT_KERNELS_BACKEND must be one of" in text
    assert "PEFT_KERNELS_BACKEND  fastest" in text


def test_env_prints_every_section_where_the_terminal_knows_ascii_only() -> None:
    code = """
    import sys
    from peft_kernels import environment
    environment.SIZES["rank"] = "x Wᵀ"  # ends up in an error's text
    from peft_kernels.__main__ import main
    sys.exit(main(["env"]))
    """
    done = run(code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    assert tuple(titles) == SECTIONS


def test_env_names_a_backend_for_every_dtype_and_a_reason_against_each_other() -> None:
    backends = environment.report()["backends"]
    assert set(backends["lora_linear on cpu"]) == set(environment.DTYPES)
    for served in backends["lora_linear on cpu"].values():
        runs_on = served["runs on"].split()[0]
        others = {f"not {name}" for name in ("triton", "cuda", "cpp", "reference")}
        assert set(served) - {"runs on"} == others - {f"not {runs_on}"}


def test_render_merges_neighbours_that_say_the_same() -> None:
    sections = {"a": {"x": {"k": "1"}, "y": {"k": "1"}, "z": {"k": "2"}, "w": "flat"}, "b": {}}
    assert environment.render(sections).splitlines() == [
        "a",
        "  x, y",
        "    k  1",
        "  z",
        "    k  2",
        "  w  flat",
        "",
        "b",
        "  none",
    ]


def test_explain_prints_the_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "--tokens", "7", "--in", "33", "--out", "20", "--rank", "3"]
    assert command_line.main([*arguments, "--dtype", "float64", "--dropout", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lora_linear runs on ")
    assert any(line.startswith("  not triton: float64") for line in lines)


def test_explain_allocates_nothing_of_the_size_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["explain", "--tokens", str(2**40), "--in", str(2**20), "--out", str(2**20)]
    assert command_line.main(arguments) == 0
    assert "lora_linear runs on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rank", "0"], "rank of at least 1"),
        (["--dropout", "1.5"], "dropout_p"),
        (["--backend", "fastest"], "backend must be one of"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_explain_answers_bad_input_with_a_message(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["explain", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["env", "--yaml"], "--yaml"),
        (["explain", "--tokens=-1"], "must be a whole number, 0 or more, got '-1'"),
        (["explain", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["tune"], "tune"),
        ([], "command"),
    ],
)
def test_a_malformed_command_line_is_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_bench_outside_a_source_tree_says_where_it_lives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "peft_kernels" / "__main__.py"))
    assert command_line.main(["bench"]) == 2
    assert "source tree" in capsys.readouterr().err


def test_bench_runs_the_source_trees_runner_with_its_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "peft_kernels" / "__main__.py"))
    (tmp_path / "bench").mkdir()
    runner = "import json, sys; open(sys.argv[1], 'w').write(json.dumps(sys.argv[2:])); sys.exit(3)"
    (tmp_path / "bench" / "run.py").write_text(runner)
    seen = tmp_path / "seen.json"
    assert command_line.main(["bench", str(seen), "--help", "--every", "-x=1"]) == 3
    assert json.loads(seen.read_text()) == ["--help", "--every", "-x=1"]
