"""Every adapter kernel and tile compiles for six GPU families, as LoRA's do.

Each tile in one of its forms; all of them: ``python -m tests.compile.sweep sm_90 bf16 --method
adapter-complete``.
"""

from __future__ import annotations

import pytest

from peft_kernels.core import tiles
from tests.compile.runner import unclean

pytest.importorskip("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_compiles_without_spills_onto_tensor_cores(family: str) -> None:
    assert not unclean(family, ("bf16", "fp32"), "adapter")


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


def test_every_form_is_compiled_for_some_family() -> None:
    from tests.compile.sweep import cases

    names = [
        case.name
        for family in tiles.FAMILIES
        for dtype in ("bf16", "fp32")
        for case in cases(family, dtype, "adapter")
    ]
    for family in tiles.FAMILIES:
        whole = [case.name for case in cases(family, "bf16", "adapter-complete")]
        forms = {name.partition("stages")[2] for name in whole if name.startswith("adapter many")}
        assert forms and all(any(name.endswith(form) for name in names) for form in forms)
