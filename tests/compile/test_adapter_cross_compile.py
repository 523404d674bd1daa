"""Every adapter kernel and tile compiles for six GPU families, as LoRA's do."""

from __future__ import annotations

import pytest

from peft_kernels.core import tiles
from tests.compile.runner import sweep

pytest.importorskip("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, dtype) for family in tiles.FAMILIES for dtype in ("bf16", "fp32")],
)
def test_compiles_without_spills_onto_tensor_cores(family: str, dtype: str) -> None:
    from tests.compile.sweep import cases

    lines = sweep(family, dtype, "adapter")
    assert [line["case"] for line in lines] == [
        f"{family} {dtype} {case.name}" for case in cases(family, dtype, "adapter")
    ]
    unclean = {line["case"]: line["problems"] for line in lines if line["problems"]}
    assert not unclean


def test_every_kernel_of_the_launchers_is_compiled() -> None:
    from tests.compile.sweep import cases

    names = {case.kernel for family in tiles.FAMILIES for case in cases(family, "bf16", "adapter")}
    assert names == {
        "_adapter_forward_kernel",
        "_adapter_backward_kernel",
        "_keep_mask_kernel",
        "_token_reduction_kernel",
    }


def test_every_activation_compiles() -> None:
    from tests.compile.sweep import cases

    names = [case.name for case in cases("sm_90", "bf16", "adapter")]
    from peft_kernels.adapter.activations import NAMES

    assert all(any(f"activation={name}" in case for case in names) for name in NAMES)
