"""What holds for every method, and for one more that joins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import readme, tables
from bench.gate import Gate
from bench.measure import Timing
from bench.memory import saved_bytes
from bench.method import (
    BOTH,
    COMPILED,
    CPU,
    DIRECTIONS,
    DRY,
    FORWARD,
    GPU,
    MAIN,
    MEMORY,
    OURS,
    SHORT,
    Method,
)
from bench.methods import METHODS, chosen
from bench.rows import NOT_RUN, TIMED, PeakTable, Row, measure_case, plain, row_of
from bench.targets import figures
from tests.bench.problems import timed_row

DEVICE = torch.device("cpu")
every = pytest.mark.parametrize("method", METHODS.values(), ids=lambda each: each.name)


def test_case_names_are_unique_over_all_methods() -> None:
    names = [case.name for method in METHODS.values() for case in method.cases]
    assert len(names) == len(set(names))


@every
def test_a_method_is_whole(method: Method) -> None:
    assert {type(case) for case in method.cases} == {method.case_type}
    assert method.case_type.op == method.name and METHODS[method.name] is method
    assert method.ours.name == OURS and method.gpu[MAIN][-1].name == OURS
    names = {each.name for each in method.providers}
    assert {COMPILED, *method.eager, *method.columns} <= names
    assert {case.suite for case in method.cases} >= {CPU, GPU, DRY}
    assert {case.dtype for case in method.cases} <= set(SHORT)
    assert {each.suite for each in method.targets} <= {case.suite for case in method.cases}
    timed = {case.suite for case in method.cases} - {DRY, MEMORY}
    assert timed <= set(method.seconds)


@every
def test_every_target_finds_the_cases_it_is_asked_of(method: Method) -> None:
    for target in method.targets:
        cases = method.of_suite(target.suite)
        assert any(target.chosen(case) for case in cases), target.label
        assert target.direction in target.label or target.suite == MEMORY


@every
def test_quick_cases_are_tiny_and_keep_what_makes_a_case(method: Method) -> None:
    for case in method.cases:
        cut = method.quick(case)
        problem = method.make_problem(cut, DEVICE)
        assert sum(tensor.numel() for tensor in problem.alive) < 10_000
        assert (cut.suite, cut.dtype) == (case.suite, case.dtype)


@every
def test_problems_repeat_and_fit_the_interpreter(method: Method) -> None:
    for case in method.of_suite(DRY):
        one, two = (method.make_problem(case, DEVICE) for _ in range(2))
        pairs = zip(one.alive, two.alive, strict=True)
        assert all(torch.equal(a, b) and max(a.shape) <= 128 for a, b in pairs)
        assert case.dtype == "float32"


@every
def test_every_provider_passes_its_gate(method: Method) -> None:
    for case in method.of_suite(DRY):
        problem = method.make_problem(case, DEVICE)
        gate = Gate(problem)
        for provider in (*method.providers, *method.gpu[MAIN]):
            if provider.name != COMPILED and provider.why_not(problem) is None:
                result = gate.check(provider)
                assert result.passed, f"{provider.name}: {result}"


@every
def test_rows_survive_json_with_their_case(method: Method) -> None:
    case = method.quick(method.of_suite(CPU)[0])
    rows = measure_case(case, [method.ours], DEVICE, 0.01, PeakTable(DEVICE, tiny=True))
    held = json.loads(json.dumps([plain(row) for row in rows]))
    assert {each["op"] for each in held} == {method.name}
    assert [row_of(each) for each in held] == rows


def test_rows_of_format_1_are_loras() -> None:
    row = timed_row(METHODS["lora"].of_suite(CPU)[0], FORWARD, 1.0, 1.0)
    held = plain(row)
    del held["op"], held["over"]
    assert row_of(held) == replace(row, over=None)


def test_committed_result_files_can_be_read() -> None:
    paths = sorted((readme.ROOT / "bench" / "results").glob("*.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [row_of(each) for each in content["rows"]]
        assert tables.table(rows) and figures(rows)


def test_chosen_keeps_the_order_of_the_list() -> None:
    assert [each.name for each in chosen(None)] == list(METHODS)
    assert [each.name for each in chosen(["prompt", "lora"])] == ["lora", "prompt"]


def _content(rows: list[Row]) -> dict[str, Any]:
    machine = {
        "cpu": "Some CPU", "torch": "2.99", "commit": "0123456789abcdef", "dirty": False,
    }  # fmt: skip
    return {
        "format": 2, "quick": False, "machine": machine, "rows": [plain(row) for row in rows],
        "figures": [vars(each) for each in figures(rows)],
    }  # fmt: skip


def _section(rows: list[Row], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return README's figures of the rows, without those that it takes from a GPU's file."""
    monkeypatch.setattr(readme, "ROOT", folder)
    path = folder / "result.json"
    path.write_text(json.dumps(_content(rows)), encoding="utf-8")
    before, after = readme.section(path).split(readme.on_gpu(readme.ON_GPU))
    return before + after


def _measured(method: Method) -> list[Row]:
    """Return rows of every CPU case and provider: ours half as long as eager, compile 0.8."""
    times = {OURS: 0.5, COMPILED: 0.8, "eager": 1.0}
    rows = []
    for case in method.of_suite(CPU):
        for direction in DIRECTIONS:
            for name, ms in times.items():
                row = timed_row(case, direction, ms)
                rows.append(replace(row, provider=name, timing=Timing(ms, ms, ms, ms, 9)))
    return rows


def test_readme_shows_speed_ups_of_a_method_without_a_frozen_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _measured(METHODS["adapter"]) + _measured(METHODS["prompt"])
    memory = METHODS["adapter"].of_suite(MEMORY)[0]
    x = 4096 * 2048 * 2
    for name, saved in ((OURS, x // 16), ("eager", x // 8)):
        rows.append(Row(memory, FORWARD, name, NOT_RUN, saved_bytes=saved))
    text = _section(rows, tmp_path, monkeypatch)
    lines = text.splitlines()
    (line,) = [x for x in lines if x.startswith("| 4096x2048 r64 relu bf16 |")]
    assert line == "| 4096x2048 r64 relu bf16 | 1.25 | 2.00 | 1.25 | 2.00 |"
    (line,) = [x for x in lines if x.startswith("| B8 S512 P20 D1024 bf16 |")]
    # peft's form has no row, so that its cells are dashes.
    assert line == "| B8 S512 P20 D1024 bf16 | - | 1.25 | 2.00 | - | 1.25 | 2.00 |"
    assert "1.00 MiB, with x 1.06 of x; eager: 2.00 MiB, with x 1.12 of x." in text
    assert "frozen `nn.Linear`" not in text and "Not reached" not in text


def test_readme_says_what_was_not_reached_and_in_which_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = METHODS["adapter"].of_suite(CPU)[0]
    assert (case.features, case.dtype) == (768, "bfloat16")
    text = _section([timed_row(case, FORWARD, 1 / 0.96)], tmp_path, monkeypatch)
    assert (
        "- Not reached: adapter, cpu D 768, forward: eager / ours at least 0.97, got 0.960" in text
    )


def test_readme_of_a_file_with_lora_alone_speaks_of_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [timed_row(case, BOTH, 1.0, 1.0) for case in METHODS["lora"].of_suite(CPU)]
    text = _section(rows, tmp_path, monkeypatch)
    assert "frozen `nn.Linear`" in text and "dapter" not in text and "rompt" not in text


def test_one_more_method_is_measured_shown_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the list of methods names them: a copy of one under another name goes through."""
    old = METHODS["adapter"]

    class NewCase(old.case_type):  # type: ignore[name-defined,misc]
        op = "new"

    def renamed(case: Any) -> NewCase:
        return NewCase(**{**vars(case), "name": case.name.replace("adapter", "new")})

    new = replace(old, name="new", case_type=NewCase, cases=tuple(map(renamed, old.cases)))
    monkeypatch.setitem(METHODS, "new", new)
    case = new.quick(new.of_suite(CPU)[0])
    peaks = PeakTable(DEVICE, tiny=True)
    providers = [each for each in new.providers if each.name != COMPILED]
    rows = measure_case(case, providers, DEVICE, 0.01, peaks)
    assert {row.status for row in rows} == {TIMED}
    assert [row_of(json.loads(json.dumps(plain(row)))) for row in rows] == rows
    assert {each.op for each in figures(rows)} == {"new"}
    assert case.name.removeprefix("new ") in _section(rows, tmp_path, monkeypatch)


@every
def test_bytes_saved_by_ours_are_no_more_than_by_eager(method: Method) -> None:
    for case in method.of_suite(DRY):
        problem = method.make_problem(case, DEVICE)
        eager = next(each for each in method.providers if each.name == "eager")
        ours, theirs = (
            saved_bytes(each.build(problem, None), problem.alive) for each in (method.ours, eager)
        )
        assert ours <= theirs + 8, "the seed"
