"""What no interpreter shows: how the compiler sums and rounds float32."""

from __future__ import annotations

import json

import pytest

from tests.compile.runner import without_interpreter

pytest.importorskip("triton")


def test_exact_products_are_summed_apart_and_tf32_operands_rounded() -> None:
    found = json.loads(without_interpreter("tests.compile.product_forms"))
    assert len(found) == 6
    for name, counts in found.items():
        _, dtype, precision = name.split()
        exact = dtype == "fp32" and precision == "ieee"
        rounded = dtype == "fp32" and precision == "tf32"
        assert (counts["additions"] > 0) == exact, name
        assert (counts["roundings"] > 0) == rounded, name
