"""The timing of the GPU report: one process, which a broken kernel may end without ending the rest.

``python -m bench.gpu_timing STATE.json SECONDS ITEM...`` works through the items "main NAME" (a
case against frozen, eager and factored) and "variants NAME" (every kernel variant of it), and after
each rewrites STATE.json. SECONDS is when it must have ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import baselines, store
from bench.cases import DRY_CASES, REPORT_CASES, LoRACase
from bench.rows import PeakTable, Row, guarded, measure_case
from bench.targets import OURS

MAIN, VARIANTS = "main", "variants"
# Triton whatever else there is: in the dry run, too, it is these kernels that are walked.
TRITON = replace(baselines.fused("triton"), name=OURS)
PROVIDERS = {
    MAIN: (baselines.FROZEN, baselines.EAGER, baselines.FACTORED, TRITON),
    VARIANTS: (baselines.FROZEN, baselines.EAGER, *baselines.VARIANTS),
}
SECONDS_A_CASE = 2.0


def items(dry: bool) -> list[str]:
    """Return what there is to time, what matters most first."""
    cases = DRY_CASES if dry else REPORT_CASES
    return [f"{group} {case.name}" for group in PROVIDERS for case in cases]


def main(arguments: Sequence[str]) -> int:
    """Time the items and return 0, or 3 if the device no longer answers."""
    state_path, seconds, *asked = arguments
    ends = time.monotonic() + float(seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = {case.name: case for case in (*REPORT_CASES, *DRY_CASES)}
    peaks = PeakTable(device, tiny=device.type == "cpu")
    state: dict[str, Any] = {"running": None, "done": [], "rows": [], "peaks": []}
    found: list[tuple[str, Row]] = []
    longest = 0.0
    for item in asked:
        if time.monotonic() + 1.2 * longest > ends:
            break
        state["running"] = item
        store.replace(Path(state_path), state)
        start = time.monotonic()
        found += [(item, row) for row in _measure(item, cases, device, peaks)]
        longest = max(longest, time.monotonic() - start)
        filled = zip(found, peaks.fill([row for _, row in found]), strict=True)
        state["rows"] = [{"item": of, **asdict(row)} for (of, _), row in filled]
        state["peaks"] = [asdict(each) for each in peaks.measured.values()]
        state["done"].append(item)
        state["running"] = None
        store.replace(Path(state_path), state)
        print(f"{time.monotonic() - start:6.1f} s  {item}", flush=True)
        if not _answers(device):
            return 3
    return 0


def _measure(
    item: str, cases: dict[str, LoRACase], device: torch.device, peaks: PeakTable
) -> list[Row]:
    group, name = item.split(" ", 1)
    case, providers = cases[name], PROVIDERS[group]
    seconds, rounds = (SECONDS_A_CASE, 5) if device.type == "cuda" else (0.1, 2)

    def measure() -> list[Row]:
        return measure_case(
            case, providers, device, seconds, peaks, counted=group == MAIN, least_rounds=rounds
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
