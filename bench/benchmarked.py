"""What the pytest-benchmark files share: one group per case and direction, one row per provider.

A provider whose results are wrong fails and has no row. Times are wall clock, synchronised on a
GPU, where the device time with a cold cache stands beside them in ``extra_info``. The process is
not pinned and providers run one after another: for CPU ratios to rely on there is ``make bench``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench.gate import Gate
from bench.measure import device_times, synchronizer
from bench.memory import count_launches, saved_bytes
from bench.method import COMPILED, CPU, DIRECTIONS, DRY, GPU, Case, Provider
from bench.methods import METHODS, method_of
from bench.rows import call_of

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
timed = pytest.mark.benchmark(min_rounds=5, max_time=0.4, min_time=0.002, disable_gc=True)


def parametrize(metafunc: pytest.Metafunc, op: str, small: tuple[Any, ...]) -> None:
    """Order by case, then provider, so that each problem and its float64 results are made once.

    Args:
        metafunc: of a test that takes case, provider and direction.
        op: the method.
        small: the cases of the default size on a CPU.
    """
    method = METHODS[op]
    chosen = {
        "tiny": method.of_suite(DRY),
        "small": method.of_suite(GPU, reported=True) if HAS_GPU else small,
        "full": method.of_suite(GPU if HAS_GPU else CPU),
    }
    size = metafunc.config.getoption("--bench-cases")
    # Compiling takes seconds, which shapes that measure nothing are not worth.
    providers = [p for p in method.providers if size != "tiny" or p.name != COMPILED]
    rows = [
        pytest.param(case, provider, direction, id=f"{case.name}, {direction}-{provider.name}")
        for case in chosen[size]
        for provider in providers
        for direction in DIRECTIONS
    ]
    metafunc.parametrize(("case", "provider", "direction"), rows)


@functools.lru_cache(maxsize=1)
def _gated(case: Case) -> tuple[Any, Gate]:
    problem = method_of(case).make_problem(case, DEVICE)
    return problem, Gate(problem)


@functools.lru_cache(maxsize=8)
def _verdict(case: Case, provider: Provider) -> str | None:
    result = _gated(case)[1].check(provider)
    return None if result.passed else str(result)


def run(benchmark: Callable[..., Any], case: Case, provider: Provider, direction: str) -> None:
    """Gate a provider, then time it and note what it stores and launches."""
    problem, _ = _gated(case)
    reason = provider.why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    failure = _verdict(case, provider)
    if failure is not None:
        pytest.fail(f"{provider.name} fails the numerics gate: {failure}")
    benchmark.group = f"{case.name}, {direction}"  # type: ignore[attr-defined]
    call, wait = call_of(provider, problem, direction), synchronizer(DEVICE)

    def waited() -> None:
        call()
        if wait is not None:
            wait()

    waited()
    extra = {
        "op": case.op,
        "case": asdict(case),  # type: ignore[call-overload]
        "direction": direction,
        "provider": provider.name,
        "plan": provider.plan(problem),
        "saved_bytes": saved_bytes(provider.build(problem, None), problem.alive),
        "launches": count_launches(call, DEVICE),
    }
    if HAS_GPU:
        timing = device_times({provider.name: call}, 0.3)[provider.name]
        extra["device_ms"] = asdict(timing)
    benchmark.extra_info |= extra  # type: ignore[attr-defined]
    benchmark(waited)
