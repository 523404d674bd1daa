"""``pytest bench/ --benchmark-only``: LoRA's rows."""

from __future__ import annotations

import pytest

from bench.benchmarked import parametrize, run, timed
from bench.lora.cases import CPU, LoRACase
from bench.method import Provider

SMALL_CASES = tuple(
    LoRACase(f"256x1024x1024 {dtype} p{p:g}", CPU, 256, 1024, 1024, 16, p, dtype)
    for dtype in ("float32", "bfloat16")
    for p in (0.0, 0.1)
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, "lora", SMALL_CASES)


@timed
def test_lora(benchmark, case: LoRACase, provider: Provider, direction: str) -> None:  # type: ignore[no-untyped-def]
    run(benchmark, case, provider, direction)
