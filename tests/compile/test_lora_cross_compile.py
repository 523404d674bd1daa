"""Every LoRA kernel and tile compiles for six GPU families: no spills, tensor cores, async copies."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from peft_kernels.core import tiles
from tests.compile.cross import compile_for

pytestmark = pytest.mark.timeout(180)

_DIRECTIONS = {
    "large": (("forward", 0), ("forward", 1)),
    "backward": (("backward", 0),),
    "masked": (("backward", 2),),
    "decode": (("forward", 0), ("forward", 1), ("backward", 0)),
    "small": (("forward", 0), ("forward", 1), ("backward", 0), ("backward", 2)),
}
_PRODUCTS = [
    pytest.param(
        family, dtype, tile, 64 if shape_class.endswith("+") else 16, direction, dropout,
        id=f"{family}-{dtype}-{shape_class}-{direction}-dropout{dropout}",
    )
    for family, dtype, shape_class, tile in tiles.lora_cases()
    for direction, dropout in _DIRECTIONS[shape_class.removesuffix("+")]
]  # fmt: skip


@pytest.fixture(autouse=True)
def compiled_kernels() -> None:
    """Skip where Triton was imported in interpreter mode: its functions cannot be compiled."""


def _assert_clean(kernel, family, source, num_warps, num_stages, *, pipelined=True) -> None:  # type: ignore[no-untyped-def]
    types, constants, divisible = source
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    report = compile_for(kernel, family, types, constants, divisible, num_warps, num_stages)
    assert not report.problems(family, pipelined=pipelined), report
