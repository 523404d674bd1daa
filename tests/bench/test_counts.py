from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench import measure
from bench.lora.baselines import EAGER, FACTORED, FROZEN, FUSED
from bench.lora.cases import ALL_CASES, DRY_CASES, REPORT_CASES, LoRACase, quick
from bench.lora.method import work
from bench.lora.problem import make_problem
from bench.measure import Timing, summarise, wall_times
from bench.memory import saved_bytes
from bench.method import FORWARD, GPU
from bench.roofline import Peaks, Work
from bench.rows import FAILED, TIMED, PeakTable, Row
from tests.bench.problems import DROPPED, SMALL


def test_saved_bytes_counts_each_storage_once_and_whole() -> None:
    x = torch.randn(10, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        wide = x * 2  # saves nothing of its own
        half = wide[:, :4]
        return (half * wide[:, 4:]).exp()  # saves both halves of wide, and its own result

    assert saved_bytes(forward, ()) == 4 * (10 * 8 + 10 * 4)


def test_saved_bytes_leaves_out_what_lives_anyway() -> None:
    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    forward = lambda: torch.nn.functional.linear(x, weight)  # noqa: E731
    assert saved_bytes(forward, (x, weight)) == 0
    assert saved_bytes(forward, (weight,)) == 4 * 10 * 8
    assert saved_bytes(forward, ()) == 4 * (10 * 8 + 6 * 8)


@pytest.mark.parametrize("provider, beyond_s", [(FUSED, 8), (EAGER, None), (FACTORED, None)])
def test_saved_bytes_of_the_providers(provider, beyond_s) -> None:  # type: ignore[no-untyped-def]
    """Ours keeps s and the seed; the others keep drop(x), eager its mask too."""
    problem = make_problem(DROPPED, "cpu")
    m, k, r = DROPPED.tokens, DROPPED.in_features, DROPPED.rank
    found = saved_bytes(provider.build(problem, None), problem.alive)
    if beyond_s is not None:
        assert found == 4 * m * r + beyond_s
    else:
        assert found >= 4 * m * r + 4 * m * k


def test_factored_without_dropout_saves_s_alone() -> None:
    problem = make_problem(SMALL, "cpu")
    forward = FACTORED.build(problem, None)
    assert saved_bytes(forward, problem.alive) == 4 * SMALL.tokens * SMALL.rank
    assert saved_bytes(FROZEN.build(problem, None), problem.alive) == 0


HAND = LoRACase("by hand", "cpu", 2, 3, 5, 1, 0.0, "bfloat16", False)


def test_work_counts_products_and_bytes() -> None:
    # x Wᵀ 2·2·3·5, A 2·2·3·1, B 2·2·1·5; x 6, W 15, A 3, B 5, y 10, s 2 elements of 2 bytes.
    assert work(HAND, "forward") == Work(60 + 12 + 20, 2 * (6 + 15 + 3 + 5 + 10 + 2))
    assert work(replace(HAND, bias=True), "forward").bytes == 2 * (41 + 5)
    # dy W 60, ds and dB 20 each, ds A and dA 12 each; dy, W, x, s, A, B read, dx, dA, dB written.
    backward = Work(60 + 2 * 20 + 2 * 12, 2 * (10 + 15 + 6 + 2 + 3 + 5 + 6 + 3 + 5))
    assert work(HAND, "forward+backward") == work(HAND, "forward") + backward


def test_work_of_a_frozen_layer_has_no_low_rank_part() -> None:
    frozen = replace(HAND, rank=0)
    assert work(frozen, "forward") == Work(60, 2 * (6 + 15 + 10))
    assert work(frozen, "forward+backward") == Work(120, 2 * (31 + 10 + 15 + 6))


def test_roofline_is_the_slower_of_arithmetic_and_traffic() -> None:
    peaks = Peaks("float32", tflops=2.0, gigabytes_per_s=100.0)
    assert peaks.least_ms(Work(flops=4 * 10**9, bytes=10**6)) == pytest.approx(2.0)
    assert peaks.least_ms(Work(flops=10**9, bytes=10**9)) == pytest.approx(10.0)
    assert peaks.best(Peaks("float32", 1.0, 150.0)) == Peaks("float32", 2.0, 150.0)


def test_rows_are_filled_by_the_best_peaks_and_a_frozen_one_by_its_own_work() -> None:
    table = PeakTable(torch.device("cpu"))
    table.measured[torch.bfloat16] = Peaks("bfloat16", 1e-6, 1e9)  # 1000 operations a ms
    timing = Timing(0.5, 1.0, 1.0, 1.0, 9)
    rows = [Row(HAND, FORWARD, name, TIMED, timing=timing) for name in ("frozen", "fused")]
    rows.append(Row(HAND, FORWARD, "broken", FAILED))
    shares = [row.roofline for row in table.fill(rows)]
    assert shares == [pytest.approx(0.060 / 0.5), pytest.approx(0.092 / 0.5), None]


def test_case_names_are_unique_and_eight_are_reported() -> None:
    names = [case.name for case in ALL_CASES]
    assert len(names) == len(set(names))
    assert len(REPORT_CASES) == 8
    assert all(case.suite == GPU for case in REPORT_CASES)
    assert {case.dropout_p for case in REPORT_CASES} == {0.0, 0.1}


def test_dry_cases_are_float32_which_the_interpreter_computes_rightly() -> None:
    assert {case.dtype for case in DRY_CASES} == {"float32"}
    assert all(max(c.tokens, c.in_features, c.out_features) <= 128 for c in DRY_CASES)


def test_quick_cases_are_tiny_and_keep_what_makes_a_case() -> None:
    for case in ALL_CASES:
        cut = quick(case)
        assert cut.tokens * cut.in_features * cut.out_features <= 24 * 40 * 56
        assert (cut.suite, cut.dtype, cut.dropout_p) == (case.suite, case.dtype, case.dropout_p)


def test_problem_repeats_and_its_mask_drops() -> None:
    one, two = make_problem(DROPPED, "cpu"), make_problem(DROPPED, "cpu")
    assert torch.equal(one.x, two.x) and torch.equal(one.seed, two.seed)
    keep = one.keep_mask()
    assert keep is not None and keep.shape == one.x.shape
    assert 0.6 < keep.float().mean() < 0.9
    assert make_problem(SMALL, "cpu").keep_mask() is None


def test_summarise_gives_order_statistics() -> None:
    timing = summarise([5.0, 1.0, 4.0, 2.0, 3.0, 10.0, 9.0, 8.0, 7.0, 6.0])
    assert (timing.min_ms, timing.p20_ms, timing.p50_ms, timing.p80_ms) == (1.0, 3.0, 6.0, 9.0)
    assert timing.samples == 10
    alone = summarise([2.5])
    assert (alone.min_ms, alone.p80_ms, alone.samples) == (2.5, 2.5, 1)


def test_wall_times_takes_turns_and_tells_slow_from_fast() -> None:
    order: list[str] = []

    def spin(name: str, count: int) -> None:
        order.append(name)
        sum(range(count))

    calls = {"slow": lambda: spin("slow", 400_000), "fast": lambda: spin("fast", 20_000)}
    times = wall_times(calls, 0.05, rounds=(4, 4), shortest_sample_s=1e-9)
    assert times["fast"].min_ms < times["slow"].min_ms
    assert times["slow"].samples == times["fast"].samples == 4
    rounds = order[-8:]
    assert rounds == ["slow", "fast", "fast", "slow"] * 2


class Clock:
    """Time that passes only when a call says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def call(self, times_s: list[float]) -> Callable[[], None]:
        """Return what takes each of ``times_s`` in turn, and from then on the last of them."""

        def run() -> None:
            self.now += times_s.pop(0) if len(times_s) > 1 else times_s[0]

        return run


def test_wall_times_end_when_every_minimum_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    steady = {"one": clock.call([0.1]), "two": clock.call([0.2])}
    assert wall_times(steady, 0.3 * 30)["one"].samples == measure._SETTLED_ROUNDS + 1
    assert wall_times(steady, 0.3 * 100)["one"].samples in (50, 51)
    # A first sample is the estimate; the twentieth round is faster than all before.
    late = {"one": clock.call([0.1]), "two": clock.call([0.2] * 20 + [0.15])}
    found = wall_times(late, 0.3 * 80)["two"]
    assert found.min_ms == pytest.approx(150.0)
    assert found.samples == 19 + measure._SETTLED_ROUNDS + 1


def test_wall_times_end_with_their_seconds_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    falling = [1.0 - 0.01 * step for step in range(60)]
    found = wall_times({"one": clock.call(falling)}, 10.0)["one"]
    assert found.samples == 10 and found.min_ms == pytest.approx(900.0)
    assert wall_times({"one": clock.call([1.0])}, 1.0)["one"].samples == 5
