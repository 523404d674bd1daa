"""Every grouped LoRA launch compiles: no spills, onto tensor cores, with asynchronous copies."""

from __future__ import annotations

import pytest

from peft_kernels.core import tiles
from tests.compile.runner import unclean

pytest.importorskip("triton")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_compiles_without_spills_onto_tensor_cores(family: str) -> None:
    from tests.compile.sweep import cases

    for dtype in ("bf16", "fp32"):
        assert {case.kernel for case in cases(family, dtype, "projections")} == {
            "_projections_kernel",
            "_projections_gradient_kernel",
        }
    assert not unclean(family, ("bf16", "fp32"), "projections")
