"""The adapter's CUDA kernels under sanitizers, and mutants of them that must be noticed.

What they share with LoRA's, the tiles and how parts are counted, has its mutants there.
"""

from __future__ import annotations

import pytest

from tests.cuda_emulation import build
from tests.cuda_emulation.mutants import Mutant
from tests.cuda_emulation.sanitizers import COMPLAINTS, MORE_ORDERS, RACE_ORDERS, failure

DRIVER = build.HERE / "adapter_driver.cpp"
SMALL = ["-DPK_SMALL_TILES"]
KERNELS = [*sorted(build.ROOT.glob("csrc/cuda/adapter*.cu")), "cuda/token_reduction.cu"]

_SYNC = "device::sync_threads();"

MUTANTS = [
    Mutant(
        "adapter: barrier between the sums and the activation",
        "adapter_kernel.h",
        f"sums[row * kWidth + column] = sum; }});\n    {_SYNC}",
        "sums[row * kWidth + column] = sum; });",
    ),
    Mutant(
        "adapter: barrier after the activation",
        "adapter_kernel.h",
        f"low is there for all of it.\n  {_SYNC}",
        "",
    ),
    Mutant(
        "adapter: barrier after dropout",
        "adapter_kernel.h",
        f"depth, features, call.dropout);\n            {_SYNC}",
        "depth, features, call.dropout);",
    ),
    Mutant(
        "adapter: wait for what is added",
        "adapter_kernel.h",
        "  device::cp_async_wait<0>();\n",
        "",
    ),
    Mutant(
        "adapter: barrier after what is added arrived",
        "adapter_kernel.h",
        f"  device::cp_async_wait<0>();\n  {_SYNC}",
        "  device::cp_async_wait<0>();",
        # Copies that arrive late here write what the result is without an adapter.
        seen_by="thread",
    ),
    Mutant(
        "adapter: 16 bytes of shared memory",
        "adapter_kernel.h",
        "device::carved_bytes(Tile::kResultElements * sizeof(T));",
        "device::carved_bytes(Tile::kResultElements * sizeof(T)) - 16;",
    ),
    Mutant(
        "adapter: end of an adapter's rows in the result",
        "adapter_kernel.h",
        "Tile::write(result, call.out, block.end,",
        "Tile::write(result, call.out, call.tokens,",
    ),
    Mutant(
        "adapter: zeros behind an adapter's rows in the reduction",
        "token_reduction.cu",
        "  v.lines = low.lines = end;\n",
        "",
    ),
    Mutant(
        "adapter: counter of the parts set back",
        "token_reduction.cu",
        "    if (last) *counter = 0;\n",
        "",
    ),
    Mutant(
        "adapter: barrier before the scale's products are summed",
        "token_reduction.cu",
        f": 0.0f;\n    }});\n    {_SYNC}",
        ": 0.0f;\n    });",
    ),
    Mutant(
        "adapter: end of the rank in the scale's products",
        "token_reduction.cu",
        "const bool inside = c0 + c < columns && r0 + r < rank;",
        "const bool inside = c0 + c < columns;",
        seen_by="address",
    ),
    Mutant(
        "adapter: count of the shares of the scale's gradient",
        "token_reduction.cu",
        "last_to_arrive(counter, tiles, slot)",
        "device::sync_threads(), device::block_x() == device::grid_x() - 1",
        seen_by="thread",
    ),
    Mutant(
        "adapter: barrier while the scale's gradient is summed",
        "token_reduction.cu",
        f"shared[device::thread_x() + width];\n    {_SYNC}",
        "shared[device::thread_x() + width];",
    ),
    Mutant(
        "adapter: 16 bytes of shared memory for the scale's gradient",
        "token_reduction.cu",
        "device::carved_bytes(products * sizeof(float));",
        "device::carved_bytes(products * sizeof(float)) - 16;",
    ),
]


def test_results_are_right() -> None:
    """Without this, a mutant that fails would prove nothing."""
    assert failure(build.program([DRIVER], flags=SMALL), MORE_ORDERS) is None


def test_no_race() -> None:
    program = build.program([DRIVER], flags=SMALL, sanitizer="thread")
    assert failure(program, RACE_ORDERS) is None


def test_no_bad_access_and_no_undefined_behaviour() -> None:
    program = build.program([DRIVER, *KERNELS], sanitizer="address")
    assert failure(program, MORE_ORDERS[:3]) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_is_noticed(mutant: Mutant) -> None:
    sanitizer = None if mutant.seen_by == "results" else mutant.seen_by
    program = build.program([DRIVER], csrc=mutant.sources(), flags=SMALL, sanitizer=sanitizer)
    found = failure(program, RACE_ORDERS if sanitizer else MORE_ORDERS)
    assert found and COMPLAINTS.get(mutant.seen_by, "") in found
