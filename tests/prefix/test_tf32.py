"""Products of tf32, which the interpreter does not know: operands rounded as the compiler does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_kernels.core import tiles, triton_runtime
from tests.numerics import RoundedToTF32
from tests.prefix.problems import check, eager, problem, results

if triton_runtime.import_problem() is not None or not triton_runtime.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 (no GPU) and Triton", allow_module_level=True)

import triton
import triton.language as tl

from peft_kernels.core import device

pytestmark = pytest.mark.timeout(120)


@triton.jit
def _rounded(x):  # type: ignore[no-untyped-def]
    """Return float32 rounded to 10 bits of mantissa, as ``cvt.rna.tf32.f32`` does."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@pytest.fixture(autouse=True)
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_round_to_tf32", _rounded)
    monkeypatch.setattr(tiles, "precision", lambda *_: "tf32")


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_values_with_a_mean_are_as_accurate_as_eager(dropout_p: float) -> None:
    """What rounding takes off dout is in dp and in delta alike: in their difference it cancels."""
    given = problem(2, 2, 1, 20, 20, 5, 40, causal=True, dropout_p=dropout_p)
    # float16 has tf32's mantissa: values are exact, their mean times what dout loses is not.
    values = {
        name: (given.tensors[name] + 8.0).half().float() for name in ("value", "prefix_value")
    }
    given = replace(given, tensors=given.tensors | values)
    inputs = given.inputs()
    with RoundedToTF32():
        rounded = results(eager(given, inputs), inputs, given.dout, given.dlse)
    found = check(given, "triton", torch.float32, [rounded])
    exact = results(eager(given, inputs), inputs, given.dout, given.dlse)
    # Not float32's own error: that of rounded operands.
    assert (found["lse"] - exact["lse"]).abs().max() > 1e-4
