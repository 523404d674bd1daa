"""Prefix attention's benchmark: cases pass their gate, a step of decoding is counted as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import prefix
from bench.gate import Gate, GateResult
from bench.measure import Timing
from bench.method import BOTH, CPU, FORWARD, GPU, Provider
from bench.prefix import EAGER, FLASH, FUSED, METHOD, PrefixCase, eager_form, make_problem, quick
from bench.roofline import Work
from bench.rows import Row
from bench.targets import figures
from tests.bench.problems import figure_of, timed_row

WHOLE = PrefixCase("small prefix", CPU, 2, 4, 2, 9, 5, 16, "float32")
DECODING = replace(WHOLE, name="small prefix decoding", decoding=True)
CASES = pytest.mark.parametrize("case", [WHOLE, DECODING], ids=lambda case: case.name)
RIGHT = (EAGER, FLASH, FUSED, prefix.fused("reference"))


def check(case: PrefixCase, provider: Provider) -> GateResult:
    return Gate(make_problem(case, "cpu")).check(provider)


@CASES
@pytest.mark.parametrize("provider", RIGHT, ids=lambda each: each.name)
def test_right_providers_pass(case: PrefixCase, provider: Provider) -> None:
    result = check(case, provider)
    assert result.passed, str(result)
    names = {"y", "dq", "dk", "dv", "dprefix_k", "dprefix_v"}
    assert {each.tensor for each in result.comparisons} == names


@CASES
def test_a_key_that_is_not_seen_fails(case: PrefixCase) -> None:
    def without_the_last_key(problem: prefix.PrefixProblem) -> torch.Tensor:
        mask = problem.mask.clone()
        mask[-1, -1] = False
        return mask

    blind = Provider(
        "blind", lambda p, keep: lambda: eager_form(*p.tensors, without_the_last_key(p))
    )
    failed = {each.tensor for each in check(case, blind).comparisons if not each.passed}
    assert {"y", "dq", "dk", "dv"} <= failed


def test_a_step_of_decoding_is_one_query_that_sees_everything() -> None:
    problem = make_problem(DECODING, "cpu")
    q, k, *_ = problem.tensors
    assert (q.shape, k.shape, problem.dy.shape) == ((2, 4, 1, 16), (2, 2, 9, 16), (2, 4, 1, 16))
    assert problem.mask.shape == (1, 14) and problem.mask.all() and problem.sdpa_mask is None
    whole = make_problem(WHOLE, "cpu")
    assert whole.mask.shape == (9, 14) and whole.sdpa_mask is whole.mask
    assert quick(DECODING).decoding and quick(DECODING).queries == 1


@pytest.mark.parametrize(("case", "queries", "seen"), [(WHOLE, 9, 90), (DECODING, 1, 14)], ids=str)
def test_work_counts_what_is_seen_and_moved(case: PrefixCase, queries: int, seen: int) -> None:
    assert int(make_problem(case, "cpu").mask.sum()) == seen
    # float32: q and out, k and v, the prefix, lse.
    asked, cached, shared, lse = 4 * 16 * 8 * queries, 4 * 16 * 4 * 9, 4 * 16 * 2 * 2 * 5, 32
    moved = 2 * asked + 2 * cached + shared + lse * queries
    forward = Work(4 * 16 * 8 * seen, moved)
    assert METHOD.work(case, FORWARD) == forward
    # q, out and dout read and dq written; k and v read and their gradients written; lse again.
    more = 4 * asked + 4 * cached + 2 * shared + lse * queries
    assert METHOD.work(case, BOTH) == forward + Work(10 * 16 * 8 * seen, more)


def flash_row(mine: Row, time_ms: float) -> Row:
    timing = Timing(time_ms, time_ms, time_ms, time_ms, 9)
    return replace(mine, provider="flash", timing=timing)


def test_the_gpus_figures_are_over_eager_and_flash_by_length() -> None:
    cases = METHOD.of_suite(GPU, reported=True)
    (decoding,) = [case for case in cases if case.decoding]
    assert (decoding.batch, decoding.tokens, decoding.length) == (64, 128, 2048)
    rows: list[Row] = []
    for case in cases:
        # Decoding is asked of forward alone, and not over flash: what it misses there is no figure.
        mine = [timed_row(case, FORWARD, 0.2), timed_row(case, BOTH, 0.8 if case.decoding else 0.4)]
        share = 0.5 if case.decoding else 1.25 if case.tokens >= 2048 else 1.2
        rows += [*mine, *(flash_row(row, share * row.timing.min_ms) for row in mine if row.timing)]
    found = figures(rows, suites=[GPU])
    wanted = {
        ("gpu, forward+backward",): (2.5, True),
        ("gpu decoding, forward",): (5.0, True),
        ("gpu S >= 2048", "flash / ours"): (1.25, True),
        ("gpu S <= 512", "flash / ours"): (1.2, False),
    }
    for words, (value, reached) in wanted.items():
        figure = figure_of(found, *words)
        assert figure.value == pytest.approx(value) and figure.reached is reached
        assert figure.detail.startswith("worst of ") and "over" not in figure.detail
    assert len(found) == len(wanted)
    # What was not run is no figure of speed.
    found = figures([row for row in rows if row.provider != "flash"], suites=[GPU])
    assert figure_of(found, "gpu S >= 2048").reached is None
