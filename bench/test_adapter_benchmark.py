"""``pytest bench/ --benchmark-only``: the adapter, one group per case and direction.

A provider whose results are wrong fails and has no row. Times are wall clock; for CPU ratios to
rely on there is ``python -m bench.adapter``, which times the providers in turn.
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import pytest
import torch

from bench.adapter import (
    CPU_CASES,
    DIRECTIONS,
    GPU_CASES,
    PROVIDERS,
    TINY_CASES,
    AdapterCase,
    AdapterProblem,
    call_of,
    failure,
    make_problem,
)
from bench.measure import device_times, synchronizer
from bench.memory import count_launches, saved_bytes

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Order by case, then provider, so that each problem is made once."""
    size = metafunc.config.getoption("--lora-cases")
    full = GPU_CASES if HAS_GPU else CPU_CASES
    cases = {"tiny": TINY_CASES, "small": full[:2], "full": full}[size]
    providers = [name for name in PROVIDERS if size != "tiny" or name != "compile"]
    rows = [
        pytest.param(case, provider, direction, id=f"{case.name}, {direction}-{provider}")
        for case in cases
        for provider in providers
        for direction in DIRECTIONS
    ]
    metafunc.parametrize(("case", "provider", "direction"), rows)


@functools.lru_cache(maxsize=1)
def _problem(case: AdapterCase) -> AdapterProblem:
    return make_problem(case, DEVICE)


@functools.lru_cache(maxsize=8)
def _failure(case: AdapterCase, provider: str) -> str | None:
    return failure(provider, _problem(case))


@pytest.mark.benchmark(min_rounds=5, max_time=0.4, min_time=0.002, disable_gc=True)
def test_adapter(benchmark, case: AdapterCase, provider: str, direction: str) -> None:  # type: ignore[no-untyped-def]
    problem = _problem(case)
    wrong = _failure(case, provider)
    if wrong is not None:
        pytest.fail(f"{provider} fails the numerics gate: {wrong}")
    benchmark.group = f"{case.name}, {direction}"
    call, wait = call_of(provider, problem, direction), synchronizer(DEVICE)

    def waited() -> None:
        call()
        if wait is not None:
            wait()

    waited()
    benchmark.extra_info |= {
        "case": asdict(case),
        "direction": direction,
        "provider": provider,
        "saved_bytes": saved_bytes(PROVIDERS[provider](problem, None), problem.tensors),
        "launches": count_launches(call, DEVICE),
    }
    if HAS_GPU:
        benchmark.extra_info["device_ms"] = asdict(device_times({provider: call}, 0.3)[provider])
    benchmark(waited)
