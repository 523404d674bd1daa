"""Every grouped LoRA launch compiles: no spills, onto tensor cores, with asynchronous copies."""

from __future__ import annotations

import pytest

from peft_kernels.core import tiles
from tests.compile.runner import sweep

pytest.importorskip("triton")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_compiles_without_spills_onto_tensor_cores(family: str, dtype: str) -> None:
    from tests.compile.sweep import cases

    lines = sweep(family, dtype, "projections")
    expected = cases(family, dtype, "projections")
    assert [line["case"] for line in lines] == [f"{family} {dtype} {c.name}" for c in expected]
    assert {case.kernel for case in expected} == {
        "_projections_kernel",
        "_projections_gradient_kernel",
    }
    unclean = {line["case"]: line["problems"] for line in lines if line["problems"]}
    assert not unclean
