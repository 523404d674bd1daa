from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import tables
from bench.hosttime import profile_host
from bench.lora.baselines import EAGER, FACTORED, FROZEN, FUSED
from bench.lora.cases import CPU_CASES, HOST_CASES, MEMORY_CASE, REPORT_CASES, LoRACase
from bench.method import BOTH, FORWARD, OURS, Provider
from bench.rows import (
    FAILED,
    NOT_RUN,
    TIMED,
    PeakTable,
    Row,
    guarded,
    measure_case,
    plain,
    row_of,
    saved_row,
)
from bench.targets import figures, geometric_mean
from tests.bench.problems import DROPPED, RAISES, SCALED, SMALL, figure_of, timed_row

CPU = torch.device("cpu")
ABSENT = Provider("absent", EAGER.build, why_not=lambda problem: "not on this machine")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    providers = [FROZEN, EAGER, SCALED, RAISES, ABSENT, FUSED]
    return measure_case(DROPPED, providers, CPU, 0.05, PeakTable(CPU, tiny=True))


def test_a_provider_that_fails_the_gate_has_no_speed(rows: list[Row]) -> None:
    for row in rows:
        assert (row.timing is None) == (row.status != TIMED)
    found = {row.provider: row.status for row in rows}
    assert found == {
        "frozen": TIMED, "eager": TIMED, "scaled by 1.01": FAILED, "raises": FAILED,
        "absent": NOT_RUN, "fused": TIMED,
    }  # fmt: skip


def test_ratios_and_roofline_are_those_of_the_times(rows: list[Row]) -> None:
    for direction in (FORWARD, BOTH):
        by_name = {row.provider: row for row in rows if row.direction == direction}
        frozen, eager, ours = (by_name[name] for name in ("frozen", "eager", "fused"))
        assert frozen.timing and eager.timing and ours.timing
        assert frozen.ratio_frozen == 1.0 and eager.ratio_eager == 1.0
        assert ours.ratio_frozen == ours.timing.min_ms / frozen.timing.min_ms
        assert ours.ratio_eager == ours.timing.min_ms / eager.timing.min_ms
        assert ours.roofline is not None and ours.roofline > 0
        assert ours.plan == "cpp" or ours.plan == "reference"


def test_table_prints_failed_with_the_comparison_and_no_time(rows: list[Row]) -> None:
    text = tables.table(rows)
    broken = [line for line in text.splitlines() if line.strip().startswith("scaled by 1.01")]
    assert len(broken) == 2
    assert all("FAILED y error" in line and "bound" in line for line in broken)
    (raised, _) = [line for line in text.splitlines() if line.strip().startswith("raises")]
    assert raised.endswith("FAILED RuntimeError: no such kernel")
    assert text.count("not on this machine") == 2
    assert sum("%" in line for line in text.splitlines()) == 6


def test_rows_survive_json(rows: list[Row]) -> None:
    again = [row_of(json.loads(json.dumps(plain(row)))) for row in rows]
    assert again == rows


def test_a_case_that_breaks_becomes_a_failed_row() -> None:
    def measure() -> list[Row]:
        raise torch.OutOfMemoryError("16 TiB")

    (row,) = guarded(measure, SMALL)
    assert row.status == FAILED and row.note == "OutOfMemoryError: 16 TiB"
    assert not figures([row])[0].reached and figures([row])[0].reached is not None


def test_saved_row_counts_without_timing() -> None:
    row = saved_row(SMALL, FACTORED, CPU)
    assert row.saved_bytes == 4 * SMALL.tokens * SMALL.rank
    assert row.timing is None
    assert saved_row(SMALL, ABSENT, CPU).saved_bytes is None


def test_host_profile_names_our_own_function() -> None:
    found = profile_host(HOST_CASES[0], FUSED, CPU, calls=20, top=40)
    assert len(found) == 2
    for entries in found.values():
        own = [entry["own_us"] for entry in entries]
        assert own == sorted(own, reverse=True)
        names = [str(entry["function"]) for entry in entries]
        ours = [name for name in names if name.startswith("peft_kernels/lora/op.py:")]
        assert any(name.endswith(" lora_linear") for name in ours)
    assert "lora_linear" in tables.profile_table(found)


def _row(case: LoRACase, direction: str, x_frozen: float, x_eager: float) -> Row:
    return timed_row(case, direction, x_eager, x_frozen)


def test_figures_say_yes_at_the_limit_and_no_above_it() -> None:
    case = CPU_CASES[0]
    assert case.dtype == "float32" and case.dropout_p == 0
    at = figure_of(figures([_row(case, FORWARD, 1.05, 1.0)]), "fp32", "forward:")
    assert at.reached is True and at.value == 1.05
    above = figures([_row(case, FORWARD, 1.051, 1.001)])
    assert figure_of(above, "fp32", "forward:").reached is False
    assert figure_of(above, "cpu, forward: x eager").reached is False
    text = tables.figure_table(above)
    assert "NO" in text and "not measured" in text and "yes" not in text


def test_figures_take_the_worst_case_of_their_own_kind() -> None:
    ratios = {("float32", 0.0): 1.01, ("bfloat16", 0.0): 1.08, ("float32", 0.1): 1.15}
    ratios[("bfloat16", 0.1)] = 1.19
    rows = [_row(c, BOTH, ratios[c.dtype, c.dropout_p], 0.9) for c in CPU_CASES]
    rows[-1] = replace(rows[-1], ratio_frozen=1.3)
    found = figures(rows)
    assert figure_of(found, "fp32", "backward").value == 1.01
    assert figure_of(found, "bf16", "backward").value == 1.08
    dropped = figure_of(found, "dropout 0.1", "backward")
    assert (dropped.value, dropped.reached) == (1.3, False)
    assert dropped.detail == f"worst of 4: {CPU_CASES[-1].name}"
    assert figure_of(found, "fp32", "forward:").reached is None


def test_a_failed_gate_is_a_figure_not_reached() -> None:
    rows = [_row(case, FORWARD, 1.0, 0.9) for case in CPU_CASES]
    rows[0] = Row(rows[0].case, FORWARD, OURS, FAILED, "y error 1 (bound 0)")
    one = figure_of(figures(rows), "fp32", "forward:")
    assert one.reached is False and one.value is None and "y error" in one.detail


def test_saved_bytes_and_host_figures() -> None:
    saved = Row(MEMORY_CASE, FORWARD, OURS, NOT_RUN, saved_bytes=2**19)
    host = [_row(case, FORWARD, 9.0, 1.2 + 0.1 * case.dropout_p) for case in HOST_CASES]
    found = figures([saved, *host])
    assert figure_of(found, "saved").reached is True
    assert figure_of(found, "host", "forward:").reached is False
    more = figures([replace(saved, saved_bytes=2**19 + 1)])
    assert figure_of(more, "saved").reached is False


def test_gpu_figure_is_the_geometric_mean_over_factored() -> None:
    one, two = REPORT_CASES[:2]
    ours = [_row(one, FORWARD, 1.0, 0.5), _row(two, FORWARD, 1.0, 0.5)]
    theirs = [replace(_row(one, FORWARD, 0.5, 1.0), provider="factored")]
    theirs += [replace(_row(two, FORWARD, 4.0, 1.0), provider="factored")]
    mean = figure_of(figures(ours + theirs), "gpu, forward: x factored")
    assert mean.value == pytest.approx((2.0 * 0.25) ** 0.5)
    assert mean.reached is True
    assert geometric_mean([4.0, 9.0]) == pytest.approx(6.0)
