"""LoRA's CUDA kernels under sanitizers, and mutants of them that must be noticed."""

from __future__ import annotations

import pytest

from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS
from tests.cuda_emulation.mutants import MUTANTS, Mutant
from tests.cuda_emulation.sanitizers import COMPLAINTS, MORE_ORDERS, RACE_ORDERS, failure

DRIVER = build.HERE / "lora_driver.cpp"
SMALL = ["-DPK_SMALL_TILES"]
KERNELS = sorted(build.ROOT.glob("csrc/cuda/lora*.cu")) + [
    build.ROOT / "csrc" / "cuda" / "token_reduction.cu"
]


def test_results_are_right() -> None:
    """Without this, a mutant that fails would prove nothing."""
    assert failure(build.program([DRIVER], flags=SMALL), MORE_ORDERS) is None


def test_no_race() -> None:
    program = build.program([DRIVER], flags=SMALL, sanitizer="thread")
    assert failure(program, RACE_ORDERS) is None


def test_no_bad_access_and_no_undefined_behaviour() -> None:
    program = build.program([DRIVER, *KERNELS], sanitizer="address")
    assert failure(program, [ORDERS[0], ORDERS[2]]) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_is_noticed(mutant: Mutant) -> None:
    csrc = mutant.sources()
    if mutant.seen_by == "results":
        assert failure(build.program([DRIVER], csrc=csrc, flags=SMALL), MORE_ORDERS)
        return
    program = build.program([DRIVER], csrc=csrc, flags=SMALL, sanitizer=mutant.seen_by)
    found = failure(program, RACE_ORDERS)
    assert found and COMPLAINTS[mutant.seen_by] in found
