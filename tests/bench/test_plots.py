"""The figures draw what was measured, and nothing of a row whose numbers are wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import plots
from bench.measure import Timing
from bench.method import BOTH, CPU, DIRECTIONS, FORWARD, HOST, MEMORY, MIB, OURS
from bench.methods import METHODS
from bench.plots import roofline, saved, speed_up, style
from bench.roofline import Peaks
from bench.rows import FAILED, NOT_RUN, TIMED, PeakTable, Row, measure_case, plain
from tests.bench.problems import DROPPED, SCALED

pytest.importorskip("matplotlib")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

MACHINE = {"cpu": "Some CPU", "torch": "2.99", "commit": "0123456789abcdef", "dirty": False}
PEAKS = [{"suite": "cpu", **asdict(Peaks(each, 0.2, 50.0))} for each in ("float32", "bfloat16")]
LEAST = {OURS: 2.0, "eager": 3.0, "peft": 3.5, "factored": 2.5, "compile": 4.0, "frozen": 1.9}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close what a test draws: pyplot keeps every figure."""
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def _row(case: Any, direction: str, provider: str, ms: float | None = None) -> Row:
    ms = LEAST[provider] if ms is None else ms
    timing = Timing(ms, ms, ms, ms, 9)
    return Row(case, direction, provider, TIMED, timing=timing, saved_bytes=MIB)


def _rows(op: str, count: int = 2) -> list[Row]:
    return [
        _row(case, direction, provider.name)
        for case in METHODS[op].of_suite(CPU)[:count]
        for direction in DIRECTIONS
        for provider in METHODS[op].providers
    ]


def _fail(rows: list[Row], provider: str, case: Any) -> list[Row]:
    """Return ``rows`` with one provider's results wrong at one case, as the gate leaves them."""
    return [
        Row(row.case, row.direction, row.provider, FAILED, "y error 1 (bound 0)")
        if (row.provider, row.case) == (provider, case)
        else row
        for row in rows
    ]


def _content(rows: list[Row]) -> dict[str, Any]:
    held = {
        "format": 2, "quick": False, "machine": MACHINE, "peaks": PEAKS,
        "rows": [plain(row) for row in rows],
    }  # fmt: skip
    content: dict[str, Any] = json.loads(json.dumps(held))
    return content


def _marks(figure: Figure) -> int:
    """Return how many points were drawn, the legend not counted."""
    return sum(len(c.get_offsets()) for axis in figure.axes for c in axis.collections)


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_points_are_the_least_times_of_others_over_ours() -> None:
    rows = [plain(row) for row in _rows("prompt", 1)]
    name = rows[0]["case"]["name"]
    assert speed_up.points(rows, FORWARD) == {
        "peft": {name: 1.75}, "eager": {name: 1.5}, "compile": {name: 2.0},
    }  # fmt: skip


@pytest.mark.parametrize("op", METHODS)
def test_every_method_is_drawn(op: str) -> None:
    rows = _rows(op)
    others = len(METHODS[op].providers) - 1
    figure = speed_up.draw(_content(rows))
    assert _marks(figure) == 2 * len(DIRECTIONS) * others
    assert [axis.get_title("left") for axis in figure.axes] == [
        f"{op}, cpu: {direction}" for direction in DIRECTIONS
    ]
    assert "failed" not in _texts(figure)


@pytest.mark.parametrize("op", METHODS)
def test_ours_that_failed_has_no_point_and_says_so(op: str) -> None:
    case = METHODS[op].of_suite(CPU)[0]
    rows = _fail(_rows(op), OURS, case)
    others = len(METHODS[op].providers) - 1
    figure = speed_up.draw(_content(rows))
    assert _marks(figure) == len(DIRECTIONS) * others
    assert _texts(figure).count("failed") == len(DIRECTIONS)
    assert len(figure.axes[0].get_yticks()) == 2


@pytest.mark.parametrize("provider", [OURS, "eager"])
def test_a_failed_row_is_in_no_figure(provider: str) -> None:
    case = METHODS["lora"].of_suite(CPU)[0]
    whole = _rows("lora")
    rows = _fail(whole, provider, case)
    assert _marks(roofline.draw(_content(whole))) == len(whole)
    assert _marks(roofline.draw(_content(rows))) == len(whole) - len(DIRECTIONS)
    drawn = saved.bars([plain(row) for row in rows])
    assert provider not in drawn[case.name] and len(drawn) == 2
    points = speed_up.points(style.timed([plain(row) for row in rows]), FORWARD)
    assert case.name not in points.get(provider, {})
    assert (case.name in points.get("compile", {})) == (provider != OURS)


def test_a_failed_row_is_not_drawn_even_with_times_and_bytes() -> None:
    """Whatever a file holds: the figures ask for the status, not for what happens to be there."""
    case = METHODS["lora"].of_suite(CPU)[0]
    rows = [
        replace(row, status=FAILED) if (row.provider, row.case) == (OURS, case) else row
        for row in _rows("lora", 1)
    ]
    content = _content(rows)
    assert speed_up.draw(content) is None
    assert _marks(roofline.draw(content)) == len(rows) - len(DIRECTIONS)
    assert OURS not in saved.bars(content["rows"])[case.name]


def test_rows_of_a_real_run_with_a_broken_provider() -> None:
    """The gate finds it; no figure shows it."""
    lora = METHODS["lora"]
    broken = replace(SCALED, name=OURS)
    providers = [each for each in lora.providers[:-1] if each.name != "compile"] + [broken]
    cpu = torch.device("cpu")
    rows = measure_case(DROPPED, providers, cpu, 0.02, PeakTable(cpu, tiny=True))
    assert {row.status for row in rows if row.provider == OURS} == {FAILED}
    content = _content(rows)
    assert speed_up.draw(content) is None
    assert _marks(roofline.draw(content)) == sum(row.status == "timed" for row in rows) > 0
    assert OURS not in saved.bars(content["rows"])[DROPPED.name]


def test_committed_rows_with_commits_of_their_own_are_drawn_and_named() -> None:
    rows = [
        plain(row) | {"commit": commit} for row in _rows("lora", 1) for commit in ("ab12", "cd34")
    ]
    machine = {"gpu": "Some GPU", "cpu": "Some CPU", "torch": "2.99"}
    content = _content([]) | {"rows": rows, "machine": machine}
    del content["quick"]
    for draw in (speed_up.draw, roofline.draw, saved.draw):
        title = draw(content).get_suptitle()
        assert title.endswith("\nSome GPU, torch 2.99, commit ab12, cd34")


@pytest.mark.parametrize("op", METHODS)
def test_the_ratio_beside_a_panel_says_over_which_forms_it_is(op: str) -> None:
    texts = _texts(speed_up.draw(_content(_rows(op))))
    peft = "peft" in {each.name for each in METHODS[op].providers}
    assert ("over eager\nor peft" in texts, "over\neager" in texts) == (peft, not peft)


def test_a_point_is_work_over_bytes_and_over_time() -> None:
    case = METHODS["lora"].of_suite(CPU)[0]
    work = METHODS["lora"].work(case, BOTH, OURS)
    found = roofline.point(plain(_row(case, BOTH, OURS, 2.0)))
    assert found == (work.flops / work.bytes, work.flops / 2e6)
    prompt = METHODS["prompt"].of_suite(CPU)[0]
    assert roofline.point(plain(_row(prompt, FORWARD, OURS))) is None


def test_small_host_calls_are_not_among_the_shapes() -> None:
    (case, _) = METHODS["lora"].of_suite(HOST)
    rows = [_row(case, FORWARD, name) for name in ("eager", OURS)]
    assert speed_up.draw(_content(rows)) is None and roofline.draw(_content(rows)) is None


def test_bytes_are_those_of_the_cases_counted_for_it() -> None:
    lora = METHODS["lora"]
    (memory,) = lora.of_suite(MEMORY)
    counted = [
        Row(memory, FORWARD, name, NOT_RUN, "bytes only", saved_bytes=MIB * size)
        for name, size in (("eager", 3), (OURS, 1))
    ]
    rows = [plain(row) for row in [*_rows("lora"), *counted]]
    assert saved.bars(rows) == {memory.name: {"eager": 3 * MIB, OURS: MIB}}


def test_unknown_providers_have_their_own_colour_and_ours_is_last() -> None:
    case = METHODS["lora"].of_suite(CPU)[0]
    names = ["a peer", "eager", OURS, "another"]
    rows = [plain(replace(_row(case, FORWARD, "eager"), provider=name)) for name in names]
    found = style.styles({"rows": rows}, rows)
    assert list(found) == ["eager", "a peer", "another", OURS]
    assert len(set(found.values())) == 4
    assert style.styles({"rows": rows}, rows[3:]) == {"another": found["another"]}


def test_draw_writes_each_figure_and_leaves_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    source.write_text(json.dumps(_content(_rows("adapter", 1))), encoding="utf-8")
    found = plots.draw(source, tmp_path / "figures")
    names = [f"run-{each}.png" for each in ("speedup", "roofline", "saved")]
    assert [path.name for path in found] == names
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(names)


def test_committed_results_of_older_formats_can_be_drawn(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "bench" / "results"
    for path in folder.glob("*.json"):
        assert len(plots.draw(path, tmp_path)) == 3


@pytest.mark.parametrize("spread", [1.2, 8.0, 200.0, 5000.0])
def test_numbers_below_an_axis_do_not_overlap(spread: float) -> None:
    rows = _rows("lora", 1)
    for row in rows:
        if row.provider == "eager" and row.timing is not None:
            ms = LEAST[OURS] * spread
            rows[rows.index(row)] = _row(row.case, row.direction, "eager", ms)
    figure = speed_up.draw(_content(rows))
    figure.canvas.draw()
    for axis in figure.axes:
        low, high = axis.get_xlim()
        labels = [
            label.get_window_extent()
            for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
            if low <= place <= high
        ]
        assert len(labels) >= 2
        for left, right in itertools.pairwise(labels):
            assert left.x1 < right.x0
