"""``pytest bench/ --benchmark-only``: one group per case and direction, one row per provider.

A provider whose results are wrong fails and has no row. Times are wall clock, synchronised on a
GPU, where the device time with a cold cache stands beside them in ``extra_info``. The process is
not pinned and providers run one after another: for CPU ratios to rely on there is ``make bench``.
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import pytest
import torch

from bench.baselines import BASELINES, FUSED, Provider
from bench.cases import CPU, CPU_CASES, DRY_CASES, GPU_CASES, REPORT_CASES, LoRACase
from bench.gate import Gate
from bench.measure import device_times, synchronizer
from bench.memory import count_launches, saved_bytes
from bench.problem import Problem, make_problem
from bench.rows import DIRECTIONS, call_of

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SMALL_CASES = tuple(
    LoRACase(f"256x1024x1024 {dtype} p{p:g}", CPU, 256, 1024, 1024, 16, p, dtype)
    for dtype in ("float32", "bfloat16")
    for p in (0.0, 0.1)
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Order by case, then provider, so that each problem and its float64 results are made once."""
    chosen: dict[str, tuple[LoRACase, ...]] = {
        "tiny": DRY_CASES,
        "small": REPORT_CASES if HAS_GPU else SMALL_CASES,
        "full": GPU_CASES if HAS_GPU else CPU_CASES,
    }
    size = metafunc.config.getoption("--lora-cases")
    # Compiling takes seconds, which shapes that measure nothing are not worth.
    providers = [p for p in (*BASELINES, FUSED) if size != "tiny" or p.name != "compile"]
    rows = [
        pytest.param(case, provider, direction, id=f"{case.name}, {direction}-{provider.name}")
        for case in chosen[size]
        for provider in providers
        for direction in DIRECTIONS
    ]
    metafunc.parametrize(("case", "provider", "direction"), rows)


@functools.lru_cache(maxsize=1)
def _gated(case: LoRACase) -> tuple[Problem, Gate]:
    problem = make_problem(case, DEVICE)
    return problem, Gate(problem)


@functools.lru_cache(maxsize=8)
def _verdict(case: LoRACase, provider: Provider) -> str | None:
    problem, gate = _gated(case)
    result = gate.check(provider)
    return None if result.passed else str(result)


@pytest.mark.benchmark(min_rounds=5, max_time=0.4, min_time=0.002, disable_gc=True)
def test_lora(benchmark, case: LoRACase, provider: Provider, direction: str) -> None:  # type: ignore[no-untyped-def]
    problem, _ = _gated(case)
    reason = provider.why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    failure = _verdict(case, provider)
    if failure is not None:
        pytest.fail(f"{provider.name} fails the numerics gate: {failure}")
    benchmark.group = f"{case.name}, {direction}"
    call = call_of(provider, problem, direction)
    wait = synchronizer(DEVICE)

    def waited() -> None:
        call()
        if wait is not None:
            wait()

    waited()
    known = (problem.x, *problem.parameters)
    benchmark.extra_info |= {
        "case": asdict(case),
        "direction": direction,
        "provider": provider.name,
        "plan": provider.plan(problem),
        "saved_bytes": saved_bytes(provider.build(problem, None), known),
        "launches": count_launches(call, DEVICE),
    }
    if HAS_GPU:
        timing = device_times({provider.name: call}, 0.3)[provider.name]
        benchmark.extra_info["device_ms"] = asdict(timing)
    benchmark(waited)
