"""Our host time of small calls is no worse than the committed one, and worse is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import host_baseline
from bench.host_baseline import ELSEWHERE, MARGIN, SLACK, Baseline, Setting
from bench.hosttime import HostTime, count_calls
from bench.method import DIRECTIONS, OURS, Case, Provider
from bench.methods import METHODS, method_of
from peft_kernels.core import extension

CASES = host_baseline.cases()
compiled = pytest.mark.skipif(
    extension.build_info() is None, reason="the committed times are of the C++ kernels"
)
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def committed() -> Baseline:
    return host_baseline.read()


def test_every_small_case_is_committed(committed: Baseline) -> None:
    names = {(case.name, direction) for case in CASES for direction in DIRECTIONS}
    assert set(committed.times) == names
    assert {case.op for case in CASES} == set(METHODS)


@compiled
@every
def test_host_time_is_no_worse_than_committed(case: Case, committed: Baseline) -> None:
    said: list[str] = []
    for _ in range(3):  # a neighbour's burst passes, more work does not
        found = host_baseline.measure(case, seconds=1.0)
        assert [each.direction for each in found] == list(DIRECTIONS)
        for each in found:
            assert each.plan == committed.times[each.case, each.direction].plan
        said = [words for each in found for words in committed.complaints(each)]
        if not said:
            return
    pytest.fail("\n".join(said))


def _slowed(case: Case, work: Callable[[], object]) -> list[HostTime]:
    """Return the host times of ours with ``work`` done in every forward."""
    method = method_of(case)

    def build(problem: Any, keep: Any) -> Callable[[], Any]:
        forward = method.ours.build(problem, keep)

        def slow() -> Any:
            work()
            return forward()

        return slow

    slowed = replace(method.ours, build=build)
    return host_baseline.measure(case, seconds=1.0, ours=slowed)


def _now(case: Case) -> Baseline:
    """Return what would be committed here and now."""
    found = host_baseline.measure(case, seconds=1.0)
    return Baseline(Setting.here(), {(each.case, each.direction): each for each in found})


@every
def test_calls_added_by_hand_are_noticed(case: Case) -> None:
    def work() -> None:
        for _ in range(SLACK):
            nothing()

    def nothing() -> None: ...

    before = _now(case)
    for each in _slowed(case, work):
        said = before.complaints(each)
        assert any("python calls" in words and each.direction in words for words in said), said


@every
def test_time_added_by_hand_is_noticed(case: Case) -> None:
    """Half as much again as ours takes, in one call."""
    before = _now(case)
    longest_ns = 1e3 * max(each.ours_us for each in before.times.values())

    def work() -> None:
        end = time.perf_counter_ns() + longest_ns / 2
        while time.perf_counter_ns() < end:
            pass

    for each in _slowed(case, work):
        assert any("of eager's" in words for words in before.complaints(each)), each


KNOWN = HostTime("small", "forward", "cpp", 20.0, 10.0, 2.0, 30, 40)


def _baseline(**other: str) -> Baseline:
    return Baseline(replace(Setting.here(), **other), {("small", "forward"): KNOWN})


def test_complaints_begin_beyond_what_is_allowed() -> None:
    at = replace(KNOWN, ratio=MARGIN * 2.0, python_calls=30 + SLACK, builtin_calls=40 + SLACK)
    assert _baseline().complaints(at) == []
    for more in ({"ratio": 2.0 * MARGIN + 0.01}, {"python_calls": 33}, {"builtin_calls": 43}):
        (said,) = _baseline().complaints(replace(at, **more))
        assert said.startswith("small, forward: ")
    (said,) = _baseline().complaints(replace(KNOWN, direction="forward+backward"))
    assert "--write-host-baseline" in said


def test_microseconds_alone_are_not_compared() -> None:
    assert _baseline().complaints(replace(KNOWN, ours_us=200.0, eager_us=100.0)) == []


def test_other_versions_of_python_and_torch_may_call_some_more() -> None:
    more = replace(KNOWN, python_calls=39)
    assert _baseline().complaints(more) != []
    for other in (_baseline(python="3.9"), _baseline(torch="2.0.0")):
        assert other.complaints(more) == []
        assert other.complaints(replace(more, python_calls=42)) != []


def test_on_another_cpu_the_ratio_may_move_further_and_the_calls_may_not() -> None:
    other = _baseline(cpu="Another CPU")
    assert other.complaints(replace(KNOWN, ratio=2.0 * MARGIN * ELSEWHERE)) == []
    assert other.complaints(replace(KNOWN, ratio=2.01 * MARGIN * ELSEWHERE)) != []
    assert other.complaints(replace(KNOWN, python_calls=31 + SLACK)) != []


def test_count_calls_counts_each_kind() -> None:
    def inner() -> int:
        return len("abc")

    def outer() -> None:
        inner()
        inner()

    assert count_calls(outer) == (3, 2)


def test_write_gives_what_read_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_baseline, "cases", lambda: CASES[:1])
    path = host_baseline.write(tmp_path / "host.json")
    found = host_baseline.read(path)
    assert list(found.times) == [(CASES[0].name, each) for each in DIRECTIONS]
    assert found.setting == Setting.here()
    text = host_baseline.table(list(found.times.values()), found)
    assert CASES[0].name in text and f"{found.times[CASES[0].name, 'forward'].ratio:.2f}" in text


def test_a_provider_that_was_not_timed_has_no_host_time() -> None:
    build = method_of(CASES[0]).ours.build
    absent = Provider(OURS, build, why_not=lambda problem: "not on this machine")
    assert host_baseline.measure(CASES[0], seconds=0.01, ours=absent) == []
