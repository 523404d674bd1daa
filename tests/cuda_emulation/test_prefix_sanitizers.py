"""Prefix attention's CUDA kernels under sanitizers, and mutants of them that must be noticed."""

from __future__ import annotations

import pytest

from tests.cuda_emulation import build
from tests.cuda_emulation.mutants import Mutant
from tests.cuda_emulation.sanitizers import COMPLAINTS, MORE_ORDERS, failure

DRIVER = build.HERE / "prefix_driver.cpp"
BACKWARD = ["cuda/prefix_query_gradient.cu", "cuda/prefix_key_gradient.cu"]
SOURCES = [DRIVER, "cuda/prefix_forward.cu", *BACKWARD, "cuda/prefix_backward.cu"]

_SYNC = "device::sync_threads();"
_STAGES = "device::carved_bytes(2 * kPanelStage<T> * sizeof(T));"
_BOUNDS = "bounds[kHeld + row] = seen.last;\n  }\n"

# In what all kernels share: seen in forward.
FORWARD_MUTANTS = [
    Mutant(
        "prefix: wait for the panels of scores",
        "prefix_panel.h",
        "    device::cp_async_wait<0>();\n    // This step's",
        "    // This step's",
    ),
    Mutant(
        "prefix: barrier before panels of scores are used and reused",
        "prefix_panel.h",
        f"the last step's are no longer read.\n    {_SYNC}",
        "",
    ),
    Mutant(
        "prefix: barrier after the scores",
        "prefix_panel.h",
        f"    scores.multiply(stage, stage + kHeldElements<T>);\n  }}\n  {_SYNC}",
        "    scores.multiply(stage, stage + kHeldElements<T>);\n  }",
    ),
    Mutant(
        "prefix: wait for the panels of values",
        "prefix_panel.h",
        f"    device::cp_async_wait<0>();\n    {_SYNC}",
        f"    {_SYNC}",
    ),
    Mutant(
        "prefix: barrier before panels of values are used and reused",
        "prefix_panel.h",
        f"    device::cp_async_wait<0>();\n    {_SYNC}",
        "    device::cp_async_wait<0>();",
    ),
    Mutant(
        "prefix: barrier after the values",
        "prefix_panel.h",
        f"stages + panel % 2 * kPanelStage<T>);\n  }}\n  {_SYNC}",
        "stages + panel % 2 * kPanelStage<T>);\n  }",
    ),
    Mutant(
        "prefix: barrier between writing and reading the result",
        "prefix_panel.h",
        f"from_float<T>(sum * factor);\n    }});\n    {_SYNC}",
        "from_float<T>(sum * factor);\n    });",
    ),
    Mutant(
        "prefix: zeros behind a line by elements",
        "prefix_panel.h",
        "pack[j] = inside && j < left ? source[j] : zero<T>();",
        "pack[j] = inside ? source[j] : zero<T>();",
    ),
    Mutant(
        "prefix: zeros behind the lines by copies",
        "prefix_panel.h",
        "device::cp_async_16(target, source, inside);",
        "device::cp_async_16(target, source, true);",
    ),
    Mutant(
        # The last line's padding is spare, hence two.
        "prefix: 16 bytes between the stages",
        "prefix_panel.h",
        "kPanelStage = kHeldElements<T> + kStreamedElements<T>;",
        "kPanelStage = kHeldElements<T> + kStreamedElements<T> - 2 * kPackOf16<T>;",
    ),
    Mutant(
        "prefix: barrier after the rows of a tile",
        "prefix_forward.cu",
        f"{_BOUNDS}  {_SYNC}",
        _BOUNDS,
    ),
    Mutant(
        "prefix: 16 bytes of shared memory in forward",
        "prefix_forward.cu",
        _STAGES,
        f"{_STAGES[:-1]} - 16;",
    ),
]
MUTANTS = [
    Mutant(
        "prefix: barrier after the numbers of rows are cleared",
        "prefix_query_gradient.cu",
        f"  {_SYNC}\n  if constexpr (!kExact)",
        "  if constexpr (!kExact)",
    ),
    Mutant(
        "prefix: barrier before the sums of rows are read",
        "prefix_query_gradient.cu",
        f"if (step == 2) {{\n      {_SYNC}",
        "if (step == 2) {",
    ),
    Mutant(
        "prefix: 16 bytes of shared memory in the query gradient",
        "prefix_query_gradient.cu",
        _STAGES,
        f"{_STAGES[:-1]} - 16;",
    ),
    Mutant(
        "prefix: barrier after the rows that meet the keys",
        "prefix_key_gradient.cu",
        f"range.first_group + n0 / 4);\n    {_SYNC}",
        "range.first_group + n0 / 4);",
    ),
    Mutant(
        "prefix: nothing of rows behind the last",
        "prefix_key_gradient.cu",
        "lse[row] = exists ? lse_of<T>((gated ? call.prefix_lse : call.lse)[at]) : INFINITY;",
        "lse[row] = lse_of<T>((gated ? call.prefix_lse : call.lse)[at]);",
    ),
    Mutant(
        "prefix: 16 bytes of shared memory in the key gradient",
        "prefix_key_gradient.cu",
        _STAGES,
        f"{_STAGES[:-1]} - 16;",
    ),
    Mutant(
        "prefix: one of the parts",
        "prefix_key_gradient.cu",
        "split < splits; ++split) total",
        "split < splits - 1; ++split) total",
    ),
    Mutant(
        "prefix: end of the gradients made of parts",
        "prefix_key_gradient.cu",
        "  if (i >= size) return;\n",
        "",
        seen_by="address",
    ),
    Mutant(
        "prefix: barrier while the gate's gradient is summed",
        "prefix_backward.cu",
        f"shared[device::thread_x() + width];\n    {_SYNC}",
        "shared[device::thread_x() + width];",
    ),
    Mutant(
        "prefix: 16 bytes of shared memory for the gate's gradient",
        "prefix_backward.cu",
        "device::carved_bytes(kThreads * sizeof(float))",
        "device::carved_bytes(kThreads * sizeof(float)) - 16",
    ),
]


def test_results_are_right() -> None:
    """Without this, a mutant that fails would prove nothing."""
    assert failure(build.program(SOURCES), MORE_ORDERS) is None


def test_no_bad_access_and_no_undefined_behaviour() -> None:
    assert failure(build.program(SOURCES, sanitizer="address"), MORE_ORDERS[:3]) is None


@pytest.mark.parametrize("mutant", FORWARD_MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_of_forward_is_noticed(mutant: Mutant) -> None:
    sources, flags = [DRIVER, "cuda/prefix_forward.cu"], ["-DPK_FORWARD_ALONE"]
    assert failure(build.program(sources, csrc=mutant.sources(), flags=flags), MORE_ORDERS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_of_backward_is_noticed(mutant: Mutant) -> None:
    sanitizer = None if mutant.seen_by == "results" else mutant.seen_by
    program = build.program(SOURCES, csrc=mutant.sources(), sanitizer=sanitizer)
    found = failure(program, MORE_ORDERS[:1] if sanitizer else MORE_ORDERS)
    assert found and COMPLAINTS.get(mutant.seen_by, "") in found
