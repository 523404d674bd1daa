from __future__ import annotations

import pytest
import torch

from bench.gate import Comparison, Gate, GateResult, poisoned_memory
from bench.lora.baselines import COMPILED, EAGER, FACTORED, FROZEN, FUSED, fused
from bench.lora.cases import LoRACase
from bench.lora.problem import make_problem
from bench.method import Provider
from tests.bench.problems import (
    DROPPED,
    NARROW,
    NO_SCALED_DROPOUT,
    ONE_WRONG_VALUE,
    OWN_MASK,
    RAISES,
    SCALED,
    SMALL,
    UNWRITTEN,
)

RIGHT = (FROZEN, EAGER, FACTORED, FUSED, fused("reference"))


def check(case: LoRACase, provider: Provider) -> GateResult:
    return Gate(make_problem(case, "cpu")).check(provider)


def failed(result: GateResult) -> set[str]:
    return {each.tensor for each in result.comparisons if not each.passed}


@pytest.mark.parametrize("case", [SMALL, DROPPED, NARROW], ids=lambda case: case.name)
@pytest.mark.parametrize("provider", RIGHT, ids=lambda provider: provider.name)
def test_right_providers_pass(case: LoRACase, provider: Provider) -> None:
    result = check(case, provider)
    assert result.passed, str(result)
    names = {"y", "dx"} if provider.frozen else {"y", "dx", "da", "db"}
    assert {each.tensor for each in result.comparisons} == names


def test_compiled_provider_applies_the_gates_mask() -> None:
    # Without a compiler: what is checked is that the mask reaches the compiled function.
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager"))
        assert check(DROPPED, COMPILED).passed


@pytest.mark.parametrize("case", [SMALL, DROPPED, NARROW], ids=lambda case: case.name)
def test_a_low_rank_part_one_percent_too_large_fails(case: LoRACase) -> None:
    # In bfloat16 one percent of a part of y and dx is little more than their rounding.
    sure = {"da", "db"} if case.dtype == "bfloat16" else {"y", "dx", "da", "db"}
    assert sure <= failed(check(case, SCALED))


def test_forgotten_dropout_scale_fails() -> None:
    assert {"y", "da", "db"} <= failed(check(DROPPED, NO_SCALED_DROPOUT))


def test_another_mask_than_the_seeds_fails() -> None:
    assert {"y", "dx", "da"} <= failed(check(DROPPED, OWN_MASK))


def test_an_unwritten_row_fails_because_fresh_memory_is_nan() -> None:
    result = check(SMALL, UNWRITTEN)
    assert failed(result) == {"dx"}
    assert "dx error nan" in str(result)


def test_one_wrong_value_fails_by_the_largest_error() -> None:
    result = check(NARROW, ONE_WRONG_VALUE)
    (y,) = [each for each in result.comparisons if each.tensor == "y"]
    assert y.error <= y.error_bound, "small in the norm: only the largest error shows it"
    assert y.worst > y.worst_bound
    assert not result.passed


def test_a_provider_that_raises_fails_with_its_message() -> None:
    result = check(SMALL, RAISES)
    assert not result.passed
    assert str(result) == "RuntimeError: no such kernel"


def test_nan_is_never_within_a_bound() -> None:
    nan = float("nan")
    assert not Comparison("y", nan, 1.0, 0.0, 1.0).passed
    assert not Comparison("y", 0.0, 1.0, nan, 1.0).passed
    assert Comparison("y", 0.5, 1.0, 0.5, 1.0).passed


def test_poisoned_memory_fills_and_restores() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
