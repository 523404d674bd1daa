"""Every LoRA kernel and tile compiles for six GPU families: no spills, tensor cores, async copies.

The compiler runs in a process of its own: see ``sweep``.
"""

from __future__ import annotations

import pytest

from peft_kernels.core import tiles
from tests.compile.cross import Report
from tests.compile.runner import unclean

pytest.importorskip("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_compiles_without_spills_onto_tensor_cores(family: str) -> None:
    # float16 compiles to the code of bfloat16 but for the type of the products: one family stands
    # for all, where the tile is the widest.
    dtypes = ("bf16", "fp32", "fp16") if family == "sm_90" else ("bf16", "fp32")
    assert not unclean(family, dtypes, "lora")


def test_every_kernel_of_the_launchers_is_compiled() -> None:
    from tests.compile.sweep import cases

    names = {case.kernel for family in tiles.FAMILIES for case in cases(family, "bf16", "lora")}
    assert names == {
        "_lora_ticket_kernel",
        "_lora_ticket_tma_kernel",
        "_lora_recompute_kernel",
        "_low_rank_kernel",
        "_masked_update_kernel",
        "_token_reduction_kernel",
    }


CLEAN = Report(
    registers=255, spills=0, matrix_instructions=1, async_copies=1, shared_kib=99, tmem_columns=0
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 2}, "2 spill instructions"),
        ({"matrix_instructions": 0}, "no tensor-core instruction"),
        ({"async_copies": 0}, "no asynchronous copy"),
        ({"shared_kib": 99.5}, "KiB of shared memory"),
        ({"tmem_columns": 513}, "TMEM columns"),
    ],
)
def test_a_report_complains(change: dict[str, int], complaint: str) -> None:
    from dataclasses import replace

    assert CLEAN.problems("sm_86", pipelined=True) == []
    (found,) = replace(CLEAN, **change).problems("sm_86", pipelined=True)
    assert complaint in found
