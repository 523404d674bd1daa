"""The prompt benchmark: every provider passes its gate, and a wrong one gets no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import prompt
from bench.gate import Gate, GateResult
from bench.method import BOTH, CPU, FORWARD, GPU, OURS, Provider
from bench.prompt import EAGER, FUSED, METHOD, PEFT, PromptCase, by, eager_form, make_problem
from bench.roofline import Work
from bench.rows import FAILED, TIMED, PeakTable, Row, measure_case
from bench.targets import figures
from tests.bench.problems import timed_row

DEVICE = torch.device("cpu")
SMALL = PromptCase("small prompt", CPU, 2, 5, 3, 8, 11, "float32")
NARROW = replace(SMALL, name="small prompt bf16", dtype="bfloat16")


def check(case: PromptCase, provider: Provider) -> GateResult:
    return Gate(make_problem(case, DEVICE)).check(provider)


def broken(change: Callable[..., tuple[Tensor, Tensor, Tensor]], name: str = "broken") -> Provider:
    return by(name, lambda *given: change(*eager_form(*given)))


WRONG_LABEL = broken(lambda embeddings, mask, labels: (embeddings, mask, labels.clamp_min(-99)))
WRONG_MASK = broken(lambda embeddings, mask, labels: (embeddings, 0 * mask, labels))
ONE_BIT = broken(lambda embeddings, mask, labels: (embeddings * (1 + 2**-20), mask, labels))
TWICE = broken(lambda embeddings, *others: (2 * embeddings - embeddings.detach(), *others))
RIGHT = (PEFT, EAGER, FUSED, prompt.fused("reference"))


@pytest.mark.parametrize("case", [SMALL, NARROW], ids=lambda case: case.name)
@pytest.mark.parametrize("provider", RIGHT, ids=lambda each: each.name)
def test_right_providers_pass(case: PromptCase, provider: Provider) -> None:
    result = check(case, provider)
    assert result.passed, str(result)
    assert {each.tensor for each in result.comparisons} == {"dprompt"}


def test_copied_results_must_be_eagers_to_the_bit() -> None:
    assert str(check(SMALL, WRONG_LABEL)) == "labels differs from eager's"
    assert str(check(SMALL, WRONG_MASK)) == "mask differs from eager's"
    assert str(check(SMALL, ONE_BIT)) == "embeddings differs from eager's"


def test_a_wrong_gradient_fails() -> None:
    result = check(SMALL, TWICE)
    assert not result.passed and str(result).startswith("dprompt error")


def test_a_provider_with_wrong_results_gets_no_time() -> None:
    wrong = replace(WRONG_LABEL, name=OURS)
    peaks = PeakTable(DEVICE, tiny=True)
    rows = measure_case(SMALL, [PEFT, EAGER, wrong], DEVICE, 0.02, peaks)
    found = {(row.provider, row.status, row.timing is None) for row in rows}
    assert found == {("peft", TIMED, False), ("eager", TIMED, False), (OURS, FAILED, True)}


def test_ratios_are_over_the_faster_hand_written_form() -> None:
    rows = measure_case(SMALL, [PEFT, EAGER, FUSED], DEVICE, 0.02, PeakTable(DEVICE, tiny=True))
    for direction in (FORWARD, BOTH):
        mine = [row for row in rows if row.direction == direction]
        times = {row.provider: row.timing.min_ms for row in mine if row.timing}
        best = min(("peft", "eager"), key=lambda name: times[name])
        for row in mine:
            assert row.ratio_eager == times[row.provider] / times[best]
            assert row.over == best
            assert row.roofline is not None and row.roofline > 0


def test_figures_are_of_each_case_and_say_which_form_was_best() -> None:
    one, two = METHOD.of_suite(CPU)[:2]
    rows: list[Row] = [
        timed_row(one, FORWARD, 1.0),
        replace(timed_row(two, FORWARD, 1.001), over="peft"),
        timed_row(two, BOTH, 0.5),
    ]
    found = [each for each in figures(rows, suites=[CPU]) if each.reached is not None]
    assert [(each.value and round(each.value, 3), each.reached) for each in found] == [
        (1.0, True), (0.999, False), (2.0, True),
    ]  # fmt: skip
    assert found[1].detail == f"worst of 1: {two.name}, over peft"
    assert len(figures(rows)) == 2 * (len(METHOD.of_suite(CPU)) + len(METHOD.of_suite(GPU)))


def test_work_counts_bytes() -> None:
    hand = replace(NARROW, batch=2, tokens=5, length=3, width=8)
    # Table's rows 2·5·8 read and 2·8·8 written in bf16, the prompt 3·8 in float32; ids, mask and
    # labels of 2·5 int64 read, mask and labels of 2·8 written.
    forward = Work(0, 2 * (80 + 128) + 4 * 24 + 8 * (3 * 10 + 2 * 16))
    assert METHOD.work(hand, FORWARD, OURS) == forward
    assert METHOD.work(hand, BOTH, OURS) == forward + Work(48, 2 * 48 + 4 * 24)
