"""The kernel of dropout compiles for six GPU families: no spills, 16 bytes a thread at a time."""

from __future__ import annotations

import json

import pytest

from peft_kernels.core import tiles
from tests.compile.runner import without_interpreter

pytest.importorskip("triton")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_compiles_without_spills_into_wide_accesses(family: str) -> None:
    found = json.loads(without_interpreter("tests.compile.drop_sweep", family))
    assert list(found) == ["bf16", "fp16", "fp32"]
    for dtype, report in found.items():
        assert not report["problems"], dtype
        accesses = 4 if dtype == "fp32" else 2
        assert report["wide_loads"] == report["wide_stores"] == accesses, (dtype, report)
