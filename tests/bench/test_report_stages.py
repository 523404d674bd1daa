from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.report import building, stage, testing, training, tuning
from bench.store import ROOT
from tests.bench.test_gpu_report import runs_instead, started


class TestBuild:
    @pytest.fixture(autouse=True)
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A tree with one library newer than its sources."""
        monkeypatch.setattr(building, "ROOT", tmp_path)
        for name in ("setup.py", "peft_kernels/version.py", "csrc/a.cpp"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
            os.utime(tmp_path / name, (1000, 1000))
        for library in building.libraries(dry=True):
            library.write_text("library")
            os.utime(library, (2000, 2000))
        return tmp_path

    def test_a_missing_or_older_library_is_built(self, tree: Path) -> None:
        assert building.why_build(dry=True) is None
        os.utime(tree / "csrc/a.cpp", (3000, 3000))
        assert "older than csrc/a.cpp" in str(building.why_build(dry=True))
        (library,) = building.libraries(dry=True)
        library.unlink()
        assert "is missing" in str(building.why_build(dry=True))

    def test_a_copy_with_new_times_is_told_by_its_stamp(self, tree: Path) -> None:
        (tree / "setup.py").write_text("import sys; print('built with', sys.argv)")
        each = started("build", tree / "out")
        # What runs is this tree's setup.py.
        command = [str(tree / "setup.py")]
        run = each.run
        each.run = lambda what, given, seconds, **named: run(what, command, seconds, **named)  # type: ignore[method-assign]
        building.run(each)
        assert each.content["ok"] and "exit status 0" in each.content["ended"]
        os.utime(tree / "csrc/a.cpp", (3e9, 3e9))
        assert building.why_build(dry=True) is None
        (tree / "csrc/a.cpp").write_text("other")
        assert "have changed" in str(building.why_build(dry=True))

    def test_a_build_that_fails_is_no_success(self, tree: Path) -> None:
        each = started("build", tree / "out")
        each.run = lambda *given, **named: testing.Finished(1, 2.0)  # type: ignore[method-assign]
        building.run(each)
        assert not each.content["ok"] and "exit status 1" in each.content["ended"]
        assert not (tree / "build").exists()


def test_outcomes_are_read_from_junit_or_from_the_log(tmp_path: Path) -> None:
    junit, log = tmp_path / "junit.xml", tmp_path / "tests.log"
    plain = (
        "tests/a.py::test_one PASSED [ 10%]\n"
        "tests/a.py::test_two[x] FAILED [ 20%]\n"
        "tests/a.py::test_three SKIPPED (no) [ 30%]\ntests/a.py::test_four "
    )
    by_xdist = (
        "tests/a.py::test_one \ntests/a.py::test_two[x] \n"
        "[gw0] [ 10%] PASSED tests/a.py::test_one \ntests/a.py::test_three \n"
        "[gw1] [ 20%] FAILED tests/a.py::test_two[x] \ntests/a.py::test_four \n"
        "[gw0] [ 30%] SKIPPED tests/a.py::test_three \n"
    )
    for text in (plain, by_xdist):
        log.write_text(text)
        counts, failed = testing.outcomes(junit, log)
        assert counts == {"passed": 1, "failed": 1, "skipped": 1, "unfinished": 1}
        assert failed == ["tests/a.py::test_two[x]", "tests/a.py::test_four did not end"]
    junit.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure/></testcase>'
        '<testcase classname="a" name="three"><skipped/></testcase>'
        '<testcase classname="a" name="four"><error/></testcase></testsuite></testsuites>'
    )
    counts, failed = testing.outcomes(junit, log)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert failed == ["a::two", "a::four"]


@pytest.fixture
def marked_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with five marked tests, of which the fourth fails."""
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
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.mark.parametrize("plugins", [True, False], ids=["xdist", "shards"])
def test_every_marked_test_runs_once_and_a_failure_is_told(
    marked_tests: Path, monkeypatch: pytest.MonkeyPatch, plugins: bool
) -> None:
    monkeypatch.setattr(testing, "has_plugins", lambda: plugins)
    each = started("tests", marked_tests / "out")
    testing.run(each)
    content = each.content
    assert content["workers"] == 2 and content["files"] == ["tests/test_some.py"]
    assert content["counts"] == {"passed": 4, "failed": 1}
    assert content["failed"] == ["tests.test_some::test_marked[3]"]
    assert not content["ok"]
    assert sorted(path.name for path in each.out.iterdir()) == ["tests.json", "tests.log"]
    log = each.log.read_text()
    assert "assert 3 != 3" in log and "test_marked[1] PASSED" not in log


def test_a_test_that_breaks_the_device_or_its_process_costs_itself_alone(
    marked_tests: Path,
) -> None:
    (marked_tests / "tests" / "test_some.py").write_text(
        "import os, pytest, time, torch\n"
        "def broken(): raise torch.AcceleratorError('illegal access')\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('i', range(8))\n"
        "def test_marked(i):\n"
        "    assert torch.cuda.synchronize is not broken\n"
        "    if i == 2: os._exit(11)\n"
        "    if i == 5:\n"
        "        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken\n"
        "        broken()\n"
    )
    each = started("tests", marked_tests / "out")
    testing.run(each)
    failed = [name.rpartition("::")[2] for name in each.content["failed"]]
    assert sorted(failed) == ["test_marked[2]", "test_marked[5]"]
    assert each.content["counts"]["passed"] == 6


class TestTraining:
    def test_compiling_comes_third_in_a_process_of_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from bench.training import COMPILED, compiles, items

        (tmp_path / "training.py").write_text(
            "import json, os, sys\n"
            "path, seconds, *asked = sys.argv[1:]\n"
            "rows = json.load(open(path))['rows'] if os.path.exists(path) else []\n"
            "print(os.getpid(), asked)\n"
            "for item in asked:\n"
            "    json.dump({'rows': rows, 'running': item}, open(path, 'w'))\n"
            "    provider, case = item.split('@')\n"
            "    if provider in ('peft compiled', 'both'): os._exit(7)\n"
            "    rows.append(dict(case=case, provider=provider, note='', step_ms=2.0,\n"
            "                     tokens_per_s=9.0))\n"
            "json.dump({'rows': rows, 'running': None}, open(path, 'w'))\n"
        )
        each = started("training", tmp_path / "out")
        monkeypatch.setattr(each, "dry", False)
        runs_instead(tmp_path / "training.py", each, monkeypatch)
        training.run(each)
        rows = each.content["rows"]
        assert [f"{row['provider']}@{row['case']}" for row in rows] == items(on_gpu=True)
        assert rows[2]["provider"] == COMPILED
        compiled = [row for row in rows if compiles(row["provider"])]
        assert all(row["note"].startswith("crashed: exit status 7") for row in compiled)
        assert sum(row.get("step_ms") is None for row in rows) == len(compiled)
        assert not each.content["ok"]

    def test_what_there_is_no_time_for_is_said(self, tmp_path: Path) -> None:
        each = started("training", tmp_path, seconds=1.0)
        training.run(each)
        assert {row["note"] for row in each.content["rows"]} == {"not run, out of time"}
        assert not each.content["ok"]


class TestTune:
    def test_without_the_module_it_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
        tuning.run(started("tune", tmp_path))
        assert "there is no bench.tune" in capsys.readouterr().out

    @pytest.mark.parametrize("status", [0, 3])
    def test_its_table_is_kept_and_its_last_lines_shown(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        status: int,
    ) -> None:
        (tmp_path / "tune.py").write_text(
            "import json, sys\n"
            "json.dump({'asked': sys.argv[2:]}, open(sys.argv[1], 'w'))\n"
            "print('the table')\n"
            f"sys.exit({status})\n"
        )
        monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: name)
        each = started("tune", tmp_path / "out")
        runs_instead(tmp_path / "tune.py", each, monkeypatch)
        tuning.run(each)
        assert each.content["table"]["asked"][1:] == ["--dry"]
        assert each.content["ok"] == (status == 0)
        assert "the table" in capsys.readouterr().out
