"""``pytest bench/ --benchmark-only``: prompt tuning's rows."""

from __future__ import annotations

import pytest

from bench.benchmarked import parametrize, run, timed
from bench.method import Provider
from bench.prompt import CASES, PromptCase


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, "prompt", CASES[:2])


@timed
def test_prompt(benchmark, case: PromptCase, provider: Provider, direction: str) -> None:  # type: ignore[no-untyped-def]
    run(benchmark, case, provider, direction)
