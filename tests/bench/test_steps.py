"""What a command line chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.method import COMPILED, CPU, DIRECTIONS, GPU, HOST, MEMORY, OURS
from bench.methods import METHODS
from bench.rows import FAILED, PeakTable
from bench.steps import Asked, Found, steps
from tests.bench.problems import SCALED

DEVICE = torch.device("cpu")


def test_a_baseline_is_measured_beside_ours_alone() -> None:
    for suite in (CPU, HOST, MEMORY):
        for step in steps(suite, Asked(baselines=["eager"])):
            assert [each.name for each in step.providers] == ["eager", OURS]


def test_several_baselines_keep_the_order_of_the_method() -> None:
    asked = Asked(ops=["prompt"], baselines=[COMPILED, "peft"])
    names = {tuple(each.name for each in step.providers) for step in steps(CPU, asked)}
    assert names == {("peft", COMPILED, OURS)}


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    assert Asked().refused() is None and Asked(["lora"], baselines=["frozen"]).refused() is None
    said = Asked(["prompt"], baselines=["eager", "frozen"]).refused()
    assert said == "--baseline frozen: there are peft, eager, compile"
    assert Asked(baselines=[OURS]).refused() is not None
    assert Asked(ops=["lora", "lore"]).refused() == f"--op lore: there are {', '.join(METHODS)}"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_are_no_time_are_refused(seconds: float) -> None:
    assert Asked(seconds=0.01).refused() is None
    assert Asked(seconds=seconds).refused() == f"--seconds {seconds:g}: must be a number above 0"


@pytest.mark.parametrize("op", METHODS)
def test_every_baseline_of_a_method_can_be_named(op: str) -> None:
    method = METHODS[op]
    names = [each.name for each in method.providers if each is not method.ours]
    asked = Asked([op], baselines=names)
    assert asked.refused() is None
    for step in steps(CPU, asked):
        assert [each.name for each in step.providers] == [*names, OURS]


def test_compiled_is_measured_at_one_case_of_a_kind_on_a_cpu() -> None:
    for name, method in METHODS.items():
        compiled = [
            step.case
            for step in steps(CPU, Asked([name]))
            if COMPILED in {each.name for each in step.providers}
        ]
        kinds = [method.compiled_alike(case) for case in compiled]
        assert len(kinds) == len(set(kinds))
        assert set(kinds) == {method.compiled_alike(case) for case in method.of_suite(CPU)}
    assert all(COMPILED in {p.name for p in s.providers} for s in steps(GPU, Asked()))
    for asked in (Asked(compiles=False), Asked(quick=True)):
        assert all(COMPILED not in {p.name for p in s.providers} for s in steps(CPU, asked))


def test_every_other_provider_is_measured_at_every_case() -> None:
    for step in steps(CPU, Asked()):
        names = {each.name for each in step.providers} | {COMPILED}
        assert names == {each.name for each in step.method.providers}


def test_a_part_of_a_name_selects_from_the_whole_grid_of_a_gpu() -> None:
    reported = list(steps(GPU, Asked(["lora"])))
    assert all(step.case.reported for step in reported)
    chosen = list(steps(GPU, Asked(["lora"], contains="llama3-70b.down")))
    assert len(chosen) > 8 and not any(step.case.reported for step in chosen)


def test_a_small_case_that_fails_its_gate_has_no_host_time() -> None:
    lora = METHODS["lora"]
    (first, *_) = steps(HOST, Asked(["lora"], quick=True, seconds=0.01))
    broken = [SCALED if each is lora.ours else each for each in first.providers if not each.frozen]
    providers = (*broken[:-1], replace(broken[-1], name=OURS))
    found = Found(Asked(quick=True, seconds=0.01), {HOST: PeakTable(DEVICE, tiny=True)})
    found.measure(replace(first, providers=providers))
    rows = [row for row in found.rows() if row.provider == OURS]
    assert len(rows) == len(DIRECTIONS) and all(row.status == FAILED for row in rows)
    assert found.hosts == []
    assert found.profiles == {}
