"""The adapter's benchmark: its gate sees a wrong number, its figures are counted rightly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.adapter.cases import AdapterCase, AdapterProblem, make_problem
from bench.adapter.method import EAGER, FUSED, METHOD, eager_adapter, fused
from bench.gate import Gate, GateResult
from bench.memory import saved_bytes
from bench.method import BOTH, CPU, FORWARD, GPU, HOST, MEMORY, OURS, Provider
from bench.roofline import Work
from bench.rows import FAILED, NOT_RUN, TIMED, PeakTable, Row, measure_case
from bench.targets import figures
from tests.bench.problems import figure_of, timed_row

SMALL = AdapterCase("small adapter", CPU, 24, 40, 8, "gelu", 0.0, "float32")
DROPPED = replace(SMALL, name="small adapter dropped", dropout_p=0.25)
NARROW = replace(SMALL, name="small adapter bf16", dtype="bfloat16")
CASES = (SMALL, DROPPED, NARROW)


def check(case: AdapterCase, provider: Provider) -> GateResult:
    return Gate(make_problem(case, "cpu")).check(provider)


def failed(result: GateResult) -> set[str]:
    return {each.tensor for each in result.comparisons if not each.passed}


def broken(change: Callable[[AdapterProblem, Tensor | None], AdapterProblem]) -> Provider:
    return Provider("broken", lambda problem, keep: EAGER.build(change(problem, keep), keep))


HUNDREDTH = broken(lambda problem, keep: replace(problem, scale=1.01))
OTHER_ACTIVATION = broken(
    lambda problem, keep: replace(problem, case=replace(problem.case, activation="relu"))
)
OWN_MASK = Provider("own mask", lambda problem, keep: EAGER.build(problem, None))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", [EAGER, FUSED, fused("reference")], ids=lambda each: each.name)
def test_right_providers_pass(case: AdapterCase, provider: Provider) -> None:
    result = check(case, provider)
    assert result.passed, str(result)
    names = {"y", "dx", "ddown", "dup", "ddown_bias", "dup_bias"}
    assert {each.tensor for each in result.comparisons} == names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_branch_one_percent_too_large_fails(case: AdapterCase) -> None:
    sure = {"dup_bias"} if case.dtype == "bfloat16" else {"y", "ddown", "dup", "dup_bias"}
    assert sure <= failed(check(case, HUNDREDTH))


def test_another_activation_fails() -> None:
    assert {"y", "dx", "ddown", "dup"} <= failed(check(SMALL, OTHER_ACTIVATION))


def test_another_mask_than_the_seeds_fails() -> None:
    assert {"y", "dx", "dup"} <= failed(check(DROPPED, OWN_MASK))


def test_compiled_provider_applies_the_gates_mask() -> None:
    torch._dynamo.reset()
    (compiled,) = [each for each in METHOD.providers if each.name == "compile"]
    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager"))
        assert check(DROPPED, compiled).passed


def test_a_provider_that_fails_the_gate_has_no_speed() -> None:
    cpu = torch.device("cpu")
    wrong = replace(HUNDREDTH, name=OURS)
    rows = measure_case(SMALL, [EAGER, wrong], cpu, 0.02, PeakTable(cpu, tiny=True))
    found = {(row.provider, row.status, row.timing is None) for row in rows}
    assert found == {("eager", TIMED, False), (OURS, FAILED, True)}
    assert all(row.ratio_frozen is None for row in rows)
    assert {row.over for row in rows if row.status == TIMED} == {"eager"}


def test_ours_saves_the_pre_activations_alone_and_eager_gelu_more() -> None:
    problem = make_problem(SMALL, "cpu")
    ours, eager = (saved_bytes(p.build(problem, None), problem.alive) for p in (FUSED, EAGER))
    assert ours == 4 * 24 * 8
    assert eager == 2 * ours
    dropped = make_problem(DROPPED, "cpu")
    assert saved_bytes(FUSED.build(dropped, None), dropped.alive) == ours + 8


def test_work_counts_products_and_bytes() -> None:
    hand = AdapterCase("by hand", CPU, 2, 3, 1, "relu", 0.0, "bfloat16")
    # Two products of 2·2·3·1; x and y 6 each, pre 2, down and up 3 each, biases 1 and 3.
    assert METHOD.work(hand, FORWARD, OURS) == Work(24, 2 * (6 + 6 + 2 + 10))
    # dh, dx, d_up, d_down; x, dy, pre, down, up, down's bias read, dx and four gradients written.
    backward = Work(48, 2 * (6 + 6 + 2 + 7 + 6 + 10))
    both = METHOD.work(hand, BOTH, OURS)
    assert both == METHOD.work(hand, FORWARD, OURS) + backward


def _cases(suite: str, **chosen: object) -> list[AdapterCase]:
    return [
        case
        for case in METHOD.of_suite(suite)
        if all(getattr(case, name) == value for name, value in chosen.items())
    ]


def test_cpu_figures_are_speed_ups_with_a_least_value() -> None:
    """At the limit is reached, below it is not, and gelu and dropout have none."""
    (narrow,) = _cases(CPU, features=2048, dtype="bfloat16", activation="relu", dropout_p=0.0)
    at = figures([timed_row(narrow, FORWARD, ratio_eager=1 / 1.15)])
    assert figure_of(at, "bf16 D 2048").reached is True
    below = figures([timed_row(narrow, FORWARD, ratio_eager=1 / 1.149)])
    one = figure_of(below, "bf16 D 2048")
    assert (one.reached, one.at_least) == (False, True)
    assert one.value == pytest.approx(1.149)
    free = [c for c in _cases(CPU) if c.activation == "gelu" or c.dropout_p]
    assert len(free) == 4
    unlimited = figures([timed_row(case, each, 9.0) for case in free for each in (FORWARD, BOTH)])
    assert all(each.reached is None for each in unlimited)


def test_cpu_figures_take_the_smallest_of_their_own_cases() -> None:
    ratios = {(768, "bfloat16"): 0.98, (768, "float32"): 1.2, (2048, "bfloat16"): 1.2}
    ratios |= {(2048, "float32"): 1.3, (4096, "bfloat16"): 1.31, (4096, "float32"): 1.09}
    rows = [
        timed_row(case, each, 1 / ratios[case.features, case.dtype])
        for case in _cases(CPU, activation="relu", dropout_p=0.0)
        for each in (FORWARD, BOTH)
    ]
    assert len(rows) == 2 * len(ratios)
    found = figures(rows, suites=[CPU])
    reached = {
        each.target.split(":")[0]: (round(each.value or 0, 3), each.reached) for each in found
    }
    assert reached == {
        "cpu bf16 D 2048, forward": (1.2, True),
        "cpu bf16 D 4096, forward": (1.31, True),
        "cpu fp32 D 2048, 4096, forward": (1.09, False),
        "cpu D 2048, 4096, forward+backward": (1.09, False),
        "cpu D 768, forward": (0.98, True),
        "cpu D 768, forward+backward": (0.98, True),
    }


def test_saved_figure_counts_x_and_takes_the_largest() -> None:
    cases = _cases(MEMORY)
    kinds = [(case.activation, case.dropout_p) for case in cases]
    assert kinds == [("relu", 0.0), ("gelu", 0.0), ("gelu", 0.1)]
    assert all(case.features == 16 * case.bottleneck for case in cases)
    x = 4096 * 2048 * 2
    rows = [Row(case, FORWARD, OURS, NOT_RUN, saved_bytes=x // 16) for case in cases]
    one = figure_of(figures(rows), "saved")
    assert (one.value, one.reached, one.at_least) == (1.0625, True, False)
    rows[-1] = replace(rows[-1], saved_bytes=int(0.071 * x))
    assert figure_of(figures(rows), "saved").reached is False


def test_gpu_figures() -> None:
    case = METHOD.of_suite(GPU, reported=True)[0]
    row = replace(timed_row(case, FORWARD, 1 / 2.3), roofline=0.84)
    found = figures([row], suites=[GPU])
    assert figure_of(found, "forward: eager / ours").reached is True
    assert figure_of(found, "roofline").reached is False
    assert figure_of(found, "forward+backward").reached is None


def test_cases_are_those_of_the_issue() -> None:
    cpu = METHOD.of_suite(CPU)
    assert {(c.tokens, c.bottleneck) for c in cpu} == {(4096, 64)} and len(cpu) == 10
    gpu = METHOD.of_suite(GPU)
    assert {c.tokens for c in gpu} == {16384} and {c.dtype for c in gpu} == {"bfloat16"}
    reported = METHOD.of_suite(GPU, reported=True)
    assert {min(c.features for c in reported), max(c.features for c in reported)} == {768, 8192}
    assert {min(c.bottleneck for c in reported), max(c.bottleneck for c in reported)} == {16, 128}
    assert len(METHOD.of_suite(HOST)) == 1


def test_eager_draws_its_own_dropout_where_no_mask_is_given() -> None:
    given = make_problem(DROPPED, "cpu")
    zero = torch.zeros(())

    def branch(keep: Tensor | None) -> Tensor:
        y = eager_adapter(*given.tensors, "gelu", 1.0, 0.25, keep)
        return (y - given.tensors[0]).detach()

    drawn = branch(None)
    assert 0.1 < (drawn == zero).float().mean() < 0.4
    assert not torch.equal(drawn, branch(given.keep_mask()))
