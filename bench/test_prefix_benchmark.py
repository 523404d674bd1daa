"""``pytest bench/ --benchmark-only``: prefix attention's rows."""

from __future__ import annotations

import pytest

from bench.benchmarked import parametrize, run, timed
from bench.method import Provider
from bench.prefix import CASES, PrefixCase


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, "prefix", CASES[:2])


@timed
def test_prefix(benchmark, case: PrefixCase, provider: Provider, direction: str) -> None:  # type: ignore[no-untyped-def]
    run(benchmark, case, provider, direction)
