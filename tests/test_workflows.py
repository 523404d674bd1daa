"""The workflows for GitHub Actions and what they rely on: Makefile, versions, pins, wheels."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info < (3, 11):
    pytest.skip("reads pyproject.toml by tomllib", allow_module_level=True)

import tomllib

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github" / "workflows"
if not FOLDER.is_dir():
    pytest.skip("a source distribution has no workflows", allow_module_level=True)
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in FOLDER.glob("*.yml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PINS = (ROOT / "constraints-dev.txt").read_text("utf-8")


def _jobs() -> dict[str, dict[str, Any]]:
    return {
        f"{name}.{job}": content
        for name, workflow in WORKFLOWS.items()
        for job, content in workflow["jobs"].items()
    }


def _steps(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def _classified() -> list[str]:
    found = [re.fullmatch(r".*:: (3\.\d+)", each) for each in PROJECT["project"]["classifiers"]]
    return [each[1] for each in found if each]


def _number(version: str) -> int:
    return int(version.removeprefix("3."))


def test_there_are_the_two_workflows_and_every_job_ends_by_itself() -> None:
    assert set(WORKFLOWS) == {"tests", "wheels"}
    assert all(job["timeout-minutes"] <= 120 for job in _jobs().values())


def test_one_version_of_each_action_is_used() -> None:
    used = {step["uses"] for job in _jobs().values() for step in job["steps"] if "uses" in step}
    names = [each.partition("@")[0] for each in used]
    assert len(names) == len(set(names)) and all("@" in each for each in used)


def test_what_jobs_download_was_uploaded_by_a_job_that_they_need() -> None:
    for workflow in WORKFLOWS.values():
        jobs = workflow["jobs"]
        uploads = {
            step["with"]["name"]: name
            for name, job in jobs.items()
            for step in job["steps"]
            if step.get("uses", "").startswith("actions/upload-artifact@")
        }
        for job in jobs.values():
            for step in job["steps"]:
                if step.get("uses", "").startswith("actions/download-artifact@"):
                    needs = [job["needs"]] if isinstance(job["needs"], str) else job["needs"]
                    one = step["with"].get("name")
                    asked = [one] if one else list(uploads)
                    assert asked and all(uploads[each] in needs for each in asked)


def test_every_make_target_exists_and_those_of_ci_are_called() -> None:
    runs = list(itertools.chain.from_iterable(map(_steps, _jobs().values())))
    called = [line for line in runs if line.startswith("make ")]
    targets = {line.split()[1] for line in called}
    assert targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert targets == {"lint", "docs", "test", "gpu-report"}
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    for line in re.findall(r"^make .*$", script, re.MULTILINE):
        assert any(each == line or each.startswith(f"{line} ") for each in called), line


def test_the_pythons_are_those_that_the_package_names() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    classified = _classified()
    assert classified[0] == oldest
    assert [_number(each) for each in classified] == list(
        range(_number(oldest), _number(classified[-1]) + 1)
    )
    tested = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]["python"]
    # What development needs, by the Makefile's own words.
    needed = re.findall(r"development needs Python (3\.\d+) or later", MAKEFILE)
    assert tested == [each for each in classified if _number(each) >= _number(needed[0])]


def test_wheels_are_built_for_every_python_that_the_package_names() -> None:
    built = PROJECT["tool"]["cibuildwheel"]["build"]
    assert built == [f"cp{each.replace('.', '')}-*" for each in _classified()]


def test_wheels_are_built_with_the_pinned_torch_and_what_the_build_imports() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    installed = settings["before-build"].split()
    (torch,) = re.findall(r"^torch==.*$", PINS, re.MULTILINE)
    assert torch in installed
    assert {"ninja", "pybind11", "setuptools", "wheel"} <= set(installed)
    assert settings["build-frontend"]["args"] == ["--no-isolation"]
    assert settings["environment"]["PEFT_KERNELS_BUILD"] == "cpu"


def test_a_repaired_wheel_brings_no_library_of_torch_along() -> None:
    repair = PROJECT["tool"]["cibuildwheel"]["repair-wheel-command"]
    assert re.findall(r"--exclude (\S+)", repair) == ["libc10.so", "libtorch_cpu.so"]


def test_wheels_are_tried_with_the_oldest_torch_and_the_pinned_one() -> None:
    tried = WORKFLOWS["wheels"]["jobs"]["torch-versions"]["strategy"]["matrix"]["torch"]
    wanted = [each for each in PROJECT["project"]["dependencies"] if each.startswith("torch>=")]
    pinned = re.findall(r"^torch==(.*)$", PINS, re.MULTILINE)
    assert [f"torch>={tried[0]}".removesuffix(".0"), *tried[1:]] == wanted + pinned


def test_only_a_tag_publishes_and_only_that_job_may() -> None:
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    allowed = {name: job["permissions"] for name, job in _jobs().items() if "permissions" in job}
    assert allowed == {"wheels.publish": {"id-token": "write"}}
    publish = WORKFLOWS["wheels"]["jobs"]["publish"]
    assert publish["if"].endswith("startsWith(github.ref, 'refs/tags/v')")
    assert set(publish["needs"]) == set(WORKFLOWS["wheels"]["jobs"]) - {"publish"}
    assert publish["steps"][-1] == {"uses": "pypa/gh-action-pypi-publish@release/v1"}


def test_the_script_that_tries_a_wheel_passes_where_the_kernels_are_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from peft_kernels.core import extension
    from tests import installed

    if extension.why_not() is not None:
        pytest.skip("no compiled kernels here")
    installed.main()
    assert capsys.readouterr().out.endswith("works\n")
