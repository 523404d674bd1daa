"""LoRA's CUDA kernels under sanitizers, and mutants of them that must be noticed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS
from tests.cuda_emulation.mutants import MUTANTS, Mutant

DRIVER = build.HERE / "lora_driver.cpp"
SMALL = ["-DPK_SMALL_TILES"]
KERNELS = sorted(build.ROOT.glob("csrc/cuda/lora*.cu")) + [
    build.ROOT / "csrc" / "cuda" / "token_reduction.cu"
]
BLOCKS = 3  # at once: fewer than 256 threads of small tiles


def failure(program: Path, orders: list[tuple[int, int]], blocks: int = BLOCKS) -> str | None:
    """Return what a program says in the first order that it fails in, or None."""
    for order, seed in orders:
        command = [str(program), str(order), str(seed), str(blocks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            return f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return None


MORE_ORDERS = [*ORDERS, *((build.RANDOM, seed) for seed in range(3, 9))]
RACE_ORDERS = [ORDERS[0], ORDERS[2]]


def test_results_are_right() -> None:
    """Without this, a mutant that fails would prove nothing."""
    assert failure(build.program([DRIVER], flags=SMALL), MORE_ORDERS) is None


def test_no_race() -> None:
    program = build.program([DRIVER], flags=SMALL, sanitizer="thread")
    assert failure(program, RACE_ORDERS) is None


def test_no_bad_access_and_no_undefined_behaviour() -> None:
    program = build.program([DRIVER, *KERNELS], sanitizer="address")
    assert failure(program, [ORDERS[0], ORDERS[2]]) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_noticed(mutant: Mutant) -> None:
    csrc = mutant.sources()
    if mutant.seen_by == "results":
        assert failure(build.program([DRIVER], csrc=csrc, flags=SMALL), MORE_ORDERS)
        return
    program = build.program([DRIVER], csrc=csrc, flags=SMALL, sanitizer=mutant.seen_by)
    found = failure(program, RACE_ORDERS)
    complaint = "data race" if mutant.seen_by == "thread" else "AddressSanitizer"
    assert found and complaint in found
