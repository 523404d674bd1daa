"""The adapter's benchmark: it runs, and its gate sees a wrong number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import adapter as bench


def test_the_table_has_a_line_per_case_and_direction(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bench.TINY_CASES) * len(bench.DIRECTIONS)
    assert all("eager" in line and line.count("x  saved") == 1 for line in lines)


@pytest.mark.parametrize("case", bench.TINY_CASES, ids=lambda case: case.name)
def test_the_gate_passes_every_provider_and_sees_a_hundredth(
    case: bench.AdapterCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = bench.make_problem(case, torch.device("cpu"))
    assert [bench.failure(name, problem) for name in ("eager", "fused")] == [None, None]

    def wrong(problem: bench.AdapterProblem, keep: Tensor | None):  # type: ignore[no-untyped-def]
        call = bench.PROVIDERS["fused"](problem, keep)
        return lambda: call() * 1.01

    monkeypatch.setitem(bench.PROVIDERS, "wrong", wrong)
    assert "y error" in str(bench.failure("wrong", problem))


def test_names_of_cases_are_unique() -> None:
    cases = [*bench.CPU_CASES, *bench.GPU_CASES, *bench.TINY_CASES]
    assert len({case.name for case in cases}) == len(cases)
