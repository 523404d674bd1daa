"""Every prefix attention kernel compiles for six GPU families, as LoRA's do.

The complete grid of tiles and forms: ``python -m tests.compile.sweep sm_90 bf16 --method
prefix-complete``.
"""

from __future__ import annotations

import pytest

from peft_kernels.core import prefix_tiles, tiles
from tests.compile.runner import unclean

pytest.importorskip("triton")
DTYPES = ("bf16", "fp32")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_compiles_without_spills_onto_tensor_cores(family: str) -> None:
    assert not unclean(family, DTYPES, "prefix")


def test_every_kernel_of_the_launchers_is_compiled_for_every_family() -> None:
    from tests.compile.sweep import cases

    for family in tiles.FAMILIES:
        assert {case.kernel for case in cases(family, "bf16", "prefix")} == {
            "_prefix_forward_kernel",
            "_prefix_query_gradient_kernel",
            "_prefix_key_gradient_kernel",
            "_prefix_gradient_kernel",
            "_gate_gradient_kernel",
        }


def test_what_is_compiled_covers_heads_of_every_size_with_and_without_dropout() -> None:
    from tests.compile.sweep import cases

    names = [
        case.name
        for family in tiles.FAMILIES
        for dtype in DTYPES
        for case in cases(family, dtype, "prefix")
    ]
    for launch in prefix_tiles.LAUNCHES:
        for size in (64, 80, 96, 128, 256):
            assert any(f" {launch} d{size} " in name for name in names), (launch, size)
        for dropout in (0, 1):
            assert any(f" {launch} " in n and f" dropout{dropout} " in n for n in names)
