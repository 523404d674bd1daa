"""The bottleneck of adapters as a baseline: its own module passes the gate, and is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip(
    "adapters", reason="needs adapters, which excludes this transformers: make test-adapters"
)

from bench import third_party
from bench.adapter.cases import AdapterCase, make_problem
from bench.adapter.method import METHOD
from bench.gate import Gate, GateResult
from bench.method import MAIN
from bench.rows import TIMED, PeakTable, measure_case
from bench.third_party.adapters import ADAPTER

pytestmark = pytest.mark.external

CPU = torch.device("cpu")
RELU = AdapterCase("small adapter", "cpu", 24, 40, 7, "relu", 0.0, "float32")
CASES = (
    RELU,
    replace(RELU, activation="gelu"),
    replace(RELU, activation="gelu", dropout_p=0.25),
    replace(RELU, dtype="bfloat16"),
    replace(RELU, dtype="bfloat16", dropout_p=0.25),
)


def check(case: AdapterCase, scale: float = 1.0) -> GateResult:
    return Gate(replace(make_problem(case, CPU), scale=scale)).check(ADAPTER)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adapters_own_module_passes(case: AdapterCase, scale: float) -> None:
    result = check(case, scale)
    assert result.passed, str(result)
    names = {"y", "dx", "ddown", "dup", "ddown_bias", "dup_bias"}
    assert {each.tensor for each in result.comparisons} == names
    assert ADAPTER.why_not(make_problem(case, CPU)) is None


def test_it_draws_its_own_dropout_when_it_is_timed() -> None:
    dropped, plain = (
        ADAPTER.build(make_problem(case, CPU), None)
        for case in (replace(RELU, dropout_p=0.25), RELU)
    )
    assert not torch.equal(dropped(), dropped()) and torch.equal(plain(), plain())


def test_it_is_listed_and_measured_beside_the_others() -> None:
    assert third_party.present()["adapters"] is not None
    assert ADAPTER in METHOD.providers and ADAPTER in METHOD.gpu[MAIN]
    rows = measure_case(RELU, [ADAPTER, METHOD.ours], CPU, 0.02, PeakTable(CPU, tiny=True))
    assert {(row.provider, row.status) for row in rows} == {("adapters", TIMED), ("fused", TIMED)}
