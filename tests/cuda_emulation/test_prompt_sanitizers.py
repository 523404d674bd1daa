"""Prompt tuning's CUDA kernels under sanitizers, and mutants of them that must be noticed."""

from __future__ import annotations

import pytest

from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS
from tests.cuda_emulation.mutants import Mutant
from tests.cuda_emulation.sanitizers import MORE_ORDERS, RACE_ORDERS, failure

SOURCES = [build.HERE / "prompt_driver.cpp", "cuda/prompt.cu"]

MUTANTS = [
    Mutant(
        "prompt: barrier before the warps' counts are read",
        "prompt.cu",
        "totals[warp()] = sum;\n  sync_threads();",
        "totals[warp()] = sum;",
    ),
    Mutant(
        "prompt: barrier before the warps' counts are written again",
        "prompt.cu",
        "  sync_threads();\n  *total = all;",
        "  *total = all;",
    ),
    Mutant(
        "prompt: shared memory for the warps' counts",
        "prompt.cu",
        "carved_bytes(kWarps * sizeof(int))",
        "carved_bytes(kWarps * sizeof(int)) - 16",
    ),
    Mutant(
        "prompt: sum of a block of rows",
        "prompt.cu",
        "      total[i] += part[i];\n",
        "",
    ),
    Mutant(
        "prompt: rows left over after the last whole block",
        "prompt.cu",
        "  for (; b < end; ++b) sum.add(load(b));\n",
        "",
    ),
    Mutant(
        "prompt: end of a run of equal ids",
        "prompt.cu",
        "      if (more) rows[i] = load(nth + i);",
        "      if (nth + i < call.count) rows[i] = load(nth + i);",
    ),
]
# Reads and writes behind an array's end, which change no result.
BEYOND = [
    Mutant(
        "prompt: end of a row of the mask",
        "prompt.cu",
        "      if (s < call.tokens &&\n          (",
        "      if ((",
    ),
    Mutant(
        "prompt: end of the sorted ids",
        "prompt.cu",
        "more = nth + i < call.count && load_integer",
        "more = load_integer",
    ),
    Mutant(
        "prompt: end of a row of gradients",
        "prompt.cu",
        "  if (d >= call.width) return;\n",
        "",
    ),
]


def test_results_are_right() -> None:
    """Without this, a mutant that fails would prove nothing."""
    assert failure(build.program(SOURCES), MORE_ORDERS) is None


def test_no_bad_access_and_no_undefined_behaviour() -> None:
    assert failure(build.program(SOURCES, sanitizer="address"), [ORDERS[0], ORDERS[2]]) is None


def test_no_race() -> None:
    program = build.program(SOURCES, sanitizer="thread")
    assert failure(program, RACE_ORDERS, blocks=1) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_is_noticed(mutant: Mutant) -> None:
    assert failure(build.program(SOURCES, csrc=mutant.sources()), MORE_ORDERS)


def test_a_race_is_noticed() -> None:
    program = build.program(SOURCES, csrc=MUTANTS[1].sources(), sanitizer="thread")
    found = failure(program, RACE_ORDERS, blocks=1)
    assert found and "data race" in found


@pytest.mark.parametrize("mutant", BEYOND, ids=lambda mutant: mutant.id)
def test_a_mutant_that_goes_too_far_is_noticed(mutant: Mutant) -> None:
    found = failure(build.program(SOURCES, csrc=mutant.sources(), sanitizer="address"), [ORDERS[0]])
    assert found and "AddressSanitizer" in found
