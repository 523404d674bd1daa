"""The package that is built, and the Makefile that builds everything else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import peft_kernels

ROOT = Path(__file__).resolve().parent.parent
INHERITED = {"ARGS", "JOBS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "PYTHON", "VENV"}
INHERITED |= {"VENV_ADAPTERS"}
PREPARED = ("demo", "test", "lint", "docs", "bench")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the pure-Python wheel from a copy, as an install without a compiler does."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "peft_kernels", source / "peft_kernels", ignore=ignored)
    shutil.copytree(ROOT / "csrc", source / "csrc", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", str(tmp), str(source)],
        env=os.environ | {"PEFT_KERNELS_BUILD": "none"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp.glob("*.whl")
    return built


def test_wheel_is_pure_python_and_holds_the_package_alone(wheel: Path) -> None:
    assert wheel.name == f"peft_kernels-{peft_kernels.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"peft_kernels/py.typed", "peft_kernels/lora/op.py"} <= set(names)
    roots = {name.split("/")[0] for name in names}
    assert roots == {"peft_kernels", f"peft_kernels-{peft_kernels.__version__}.dist-info"}


def test_wheel_holds_every_module_of_the_source(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "peft_kernels").rglob("*.py")}
    assert sources <= names


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == peft_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    always = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert sorted(always) == ["torch>=2.10", 'triton; sys_platform == "linux"']
    assert {"adapters", "bench", "demo", "dev", "docs", "hf"} <= set(
        metadata.get_all("Provides-Extra", [])
    )
    assert any(each.endswith("/licenses/LICENSE") for each in archive.namelist())


def test_version_is_written_once() -> None:
    places = [*(ROOT / "peft_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    places += [ROOT / "pyproject.toml", ROOT / "setup.py"]
    written = f'"{peft_kernels.__version__}"'
    assert [path.name for path in places if written in path.read_text()] == ["version.py"]


def test_build_needs_nothing_that_pulls_in_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert requires is not None
    assert requires[1] == '"setuptools>=77"'


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", *arguments],
        cwd=ROOT,
        # A `make test ARGS=...` around this one hands down its own flags and variables.
        env={key: value for key, value in os.environ.items() if key not in INHERITED},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """Return the folder of an environment whose stamps say that it is up to date."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / ".tools").touch()
    (venv / ".ready").touch()
    (tmp_path / "venv-adapters").mkdir()
    (tmp_path / "venv-adapters" / ".ready").touch()
    return venv


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
class TestMakefile:
    @pytest.mark.parametrize("target", PREPARED)
    def test_a_fresh_machine_gets_the_pinned_torch_before_anything_builds(
        self, target: str, tmp_path: Path
    ) -> None:
        plan = make(target, f"VENV={tmp_path / 'venv'}")
        steps = ["-m venv ", "install .* torch==2.13.0", "install .* ninja", "install .* -e "]
        positions = [re.search(step, plan) for step in steps]
        assert all(positions), plan
        starts = [found.start() for found in positions if found]
        assert starts == sorted(starts)
        assert "--no-build-isolation -e" in plan

    @pytest.mark.parametrize("target", PREPARED)
    def test_a_second_call_starts_at_once(self, target: str, ready: Path) -> None:
        assert "pip" not in make(target, f"VENV={ready}")

    @pytest.mark.parametrize("target", PREPARED)
    def test_a_changed_source_rebuilds_the_extension_alone(self, target: str, ready: Path) -> None:
        plan = make(target, f"VENV={ready}", "-W", "csrc/registration.cpp")
        assert "--no-build-isolation -e" in plan
        assert "torch==" not in plan

    @pytest.mark.parametrize("changed", ["pyproject.toml", "constraints-dev.txt", "setup.py"])
    def test_changed_requirements_install_again(self, changed: str, ready: Path) -> None:
        plan = make("test", f"VENV={ready}", "-W", changed)
        assert plan.index("torch==2.13.0") < plan.index("--no-build-isolation -e")

    def test_adapters_gets_an_environment_of_its_own(self, ready: Path) -> None:
        plan = make("test", f"VENV={ready}", "-W", "constraints-adapters.txt")
        own = f"{ready}-adapters/bin/python -m "
        steps = ["pip install .* torch==2.13.0", r"pip install .* -e '\.\[adapters\]'"]
        steps += ["pytest tests/models/with_adapters"]
        positions = [re.search(re.escape(own) + step, plan) for step in steps]
        assert all(positions), plan
        starts = [found.start() for found in positions if found]
        assert starts == sorted(starts)
        assert "PEFT_KERNELS_BUILD=none" in plan
        assert f"{ready}/bin/python -m pip" not in plan

    def test_tests_that_were_selected_need_no_second_environment(self, tmp_path: Path) -> None:
        plan = make("test", f"VENV={tmp_path / 'venv'}", "ARGS=-k lora")
        assert "pytest" in plan and "adapters" not in plan

    def test_gpu_report_takes_a_given_interpreter_as_it_is(self, tmp_path: Path) -> None:
        plan = make("gpu-report", f"VENV={tmp_path / 'venv'}", "PYTHON=/opt/python3")
        assert plan.strip() == "/opt/python3 bench/gpu_report.py"

    def test_gpu_report_without_one_uses_the_environment(self, ready: Path) -> None:
        plan = make("gpu-report", f"VENV={ready}")
        assert plan.strip() == f"{ready}/bin/python bench/gpu_report.py"

    def test_help_lists_every_target(self) -> None:
        text = (ROOT / "Makefile").read_text()
        (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
        described = set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
        assert described == set(phony.split())
        assert {*PREPARED, "gpu-report", "clean", "help"} <= described


@pytest.mark.parametrize("kind,install", [("dev", "PIP"), ("adapters", "ADAPTERS")])
def test_makefile_installs_the_torch_that_is_pinned(kind: str, install: str) -> None:
    constraints = (ROOT / f"constraints-{kind}.txt").read_text()
    pinned = re.findall(r"^torch==.*$", constraints, re.MULTILINE)
    assert pinned == ["torch==2.13.0"]
    assert f"$({install}_INSTALL) {pinned[0]}" in (ROOT / "Makefile").read_text()


def test_ci_runs_lint_tests_and_the_dry_gpu_report() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    calls = re.findall(r"^make .*$", text, re.MULTILINE)
    assert calls == ["make lint", "make test", "make gpu-report DRY_RUN=1 PYTHON=.venv/bin/python"]


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Build a source distribution of what is tracked; return it and the names of those files."""
    tmp = tmp_path_factory.mktemp("sdist")
    source = tmp / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the source")
    names = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp)],
        cwd=source, env=os.environ | {"PEFT_KERNELS_BUILD": "none"}, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp.glob("*.tar.gz")
    return built, names


def test_a_source_distribution_holds_what_building_and_testing_read(
    source_distribution: tuple[Path, list[str]],
) -> None:
    built, names = source_distribution
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if not name.startswith((".git", "bench/results/"))} <= held
    assert {"csrc/cuda/device.h", "csrc/cuda_binding/binding.h", "csrc/cuda_build.py"} <= held


def test_a_source_distribution_installs(
    source_distribution: tuple[Path, list[str]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(tmp_path / "site"),
         str(source_distribution[0])],
        env=os.environ | {"PEFT_KERNELS_BUILD": "none"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import peft_kernels; print(peft_kernels.__version__, peft_kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, check=True,
    )  # fmt: skip
    version, _, file = done.stdout.strip().partition(" ")
    assert version == peft_kernels.__version__ and file.startswith(str(tmp_path))
