"""The timing of the GPU report: one process, which a broken kernel may end without ending the rest.

``python -m bench.gpu_timing STATE.json SECONDS ITEM...`` works through the items "main NAME" (a
case against its baselines) and "variants NAME" (every kernel variant of it), and after each
rewrites STATE.json. SECONDS is when it must have ended. ``--prepare ITEM...`` times nothing: it
compiles what the items will run, into the caches of Triton and torch.compile.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import methods, store
from bench.method import BOTH, DRY, GPU, MAIN, VARIANTS, Case, Provider
from bench.rows import PeakTable, Row, call_of, guarded, measure_case, plain
from bench.stages import watchdog

SECONDS_A_CASE = 2.0
ITEM_S = 120.0  # one that takes longer ends its process, and costs itself alone


def items(dry: bool, ops: Sequence[str] | None = None) -> list[str]:
    """Return what there is to time of some methods (None: all), what matters most first."""
    return [
        f"{group} {case.name}"
        for group in (MAIN, VARIANTS)
        for method in methods.chosen(ops)
        if group in method.gpu
        for case in method.of_suite(DRY if dry else GPU, reported=True)
    ]


def main(arguments: Sequence[str]) -> int:
    """Time the items and return 0, or 3 if the device no longer answers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = {case.name: case for each in methods.METHODS.values() for case in each.cases}
    if arguments[0] == "--prepare":
        for item in arguments[1:]:
            _prepare(item, cases, device)
        return 0
    state_path, seconds, *asked = arguments
    ends = time.monotonic() + float(seconds)
    peaks = PeakTable(device, tiny=device.type == "cpu")
    state: dict[str, Any] = {"running": None, "done": [], "rows": [], "peaks": []}
    found: list[tuple[str, Row]] = []
    taken: list[float] = []
    for item in asked:
        # The first one also starts the libraries.
        if time.monotonic() + 1.2 * max(taken[1:] or taken, default=0.0) > ends:
            break
        state["running"] = item
        store.replace(Path(state_path), state)
        start = time.monotonic()
        with watchdog(ITEM_S):
            found += [(item, row) for row in _measure(item, cases, device, peaks)]
        taken.append(time.monotonic() - start)
        filled = zip(found, peaks.fill([row for _, row in found]), strict=True)
        state["rows"] = [{"item": of, **plain(row)} for (of, _), row in filled]
        state["peaks"] = [asdict(each) for each in peaks.measured.values()]
        state["done"].append(item)
        state["running"] = None
        store.replace(Path(state_path), state)
        print(f"{taken[-1]:6.1f} s  {item}", flush=True)
        if not _answers(device):
            return 3
    return 0


def _resolved(item: str, cases: dict[str, Case]) -> tuple[Any, tuple[Provider, ...]]:
    """Return the case that an item names, and who computes it."""
    group, name = item.split(" ", 1)
    case = cases[name]
    return case, methods.method_of(case).gpu[group]


def _prepare(item: str, cases: dict[str, Case], device: torch.device) -> None:
    """Run forward and backward of every provider once; what one raises, its gate will say."""
    case, providers = _resolved(item, cases)
    problem = methods.method_of(case).make_problem(case, device)
    for provider in providers:
        if provider.why_not(problem) is None:
            with contextlib.suppress(Exception):
                call_of(provider, problem, BOTH)()
            print(f"ran {provider.name}  {item}", flush=True)


def _measure(
    item: str, cases: dict[str, Case], device: torch.device, peaks: PeakTable
) -> list[Row]:
    case, providers = _resolved(item, cases)
    seconds, rounds = (SECONDS_A_CASE, 5) if device.type == "cuda" else (0.1, 2)
    counted = item.startswith(f"{MAIN} ")

    def measure() -> list[Row]:
        return measure_case(
            case, providers, device, seconds, peaks, counted=counted, least_rounds=rounds
        )

    return guarded(measure, case)


def _answers(device: torch.device) -> bool:
    """Return whether the device still works: an illegal access ends it for the whole process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device no longer answers: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
