"""``pytest bench/ --benchmark-only``: the adapter's rows."""

from __future__ import annotations

import pytest

from bench.adapter.cases import CASES, AdapterCase
from bench.benchmarked import parametrize, run, timed
from bench.method import Provider


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, "adapter", CASES[:2])


@timed
def test_adapter(benchmark, case: AdapterCase, provider: Provider, direction: str) -> None:  # type: ignore[no-untyped-def]
    run(benchmark, case, provider, direction)
