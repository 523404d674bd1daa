"""Any shape, rank, layout and option, on every backend that runs here, against float64.

The bound is the standard one for a rounded sum: a few rounding units of the sum of magnitudes,
which the same formula gives on absolute values. A wrong index, mask or edge is far outside it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import explain, lora_linear
from peft_kernels.core import lora_tiles
from tests.lora.problems import Problem, eager, fused, problem, results

_SIZE = st.integers(1, 70)
_DTYPES = {
    "reference": [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    "cpp": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.float16],
}


def _serves(backend: str, given: Problem) -> bool:
    arguments = (given.x, given.weight, given.lora_a, given.lora_b)
    return explain(lora_linear, *arguments, backend=backend).backend == backend


@st.composite
def _problems(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    leading = draw(st.sampled_from([(), (1,), (2, 3), (0,)])) + (draw(_SIZE),)
    given = problem(
        leading,
        draw(_SIZE),
        draw(_SIZE),
        draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 64, 65]))),
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from([dtype, torch.float32]))
        if dtype.itemsize == 2
        else None,
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.75])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([0.0, 1.0, -2.5])),
        seed=draw(st.integers(0, 2**16)),
    )
    return _with_layout(given, draw(st.sampled_from(["packed", "sliced", "transposed", "step"])))


def _with_layout(given: Problem, layout: str) -> Problem:
    def sliced(t: Tensor) -> Tensor:
        return torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    def step(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]

    change = {"packed": lambda t: t, "sliced": sliced, "transposed": transposed, "step": step}[
        layout
    ]
    return replace(
        given,
        x=change(given.x),
        weight=change(given.weight),
        lora_a=change(given.lora_a),
        lora_b=change(given.lora_b),
        dy=change(given.dy),
    )


def _check(given: Problem, backend: str) -> None:
    wide = given.inputs(torch.float64)
    exact = results(eager(given, wide), wide, given.dy)
    magnitudes = replace(given, scale=abs(given.scale), dy=given.dy.abs())
    positive = [t.detach().abs().requires_grad_() for t in wide]
    magnitude = results(eager(magnitudes, positive), positive, magnitudes.dy)
    inputs = given.inputs()
    found = results(fused(given, inputs, backend), inputs, given.dy)
    assert found.keys() == exact.keys()
    # The float64 measure is rounded too: where float64 is judged, both errors count.
    unit = torch.finfo(given.x.dtype).eps * (2 if given.x.dtype == torch.float64 else 1)
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        error, bound = (value.double() - exact[name]).abs(), 3 * unit * magnitude[name]
        assert (error <= bound + 1e-30).all(), (
            f"{name}: error {error.max():.2e} is {(error / (bound + 1e-30)).max():.1f} bounds"
        )


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_any_call_agrees_with_float64(backend: str) -> None:
    if not _serves(backend, problem(1, 1, 1, 1)):
        pytest.skip(f"the {backend} backend does not run here: see python -m peft_kernels env")

    @settings(max_examples=150, deadline=None, derandomize=True)
    @drawn(_problems(_DTYPES[backend]))
    def run(given: Problem) -> None:
        _check(given, backend)

    run()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", lora_tiles.VARIANTS)
def test_any_call_agrees_with_float64_in_the_triton_interpreter(variant: str) -> None:
    if not _serves("triton", problem(1, 1, 1, 1)):
        pytest.skip("Triton interprets CPU tensors only under TRITON_INTERPRET=1")

    @settings(max_examples=12, deadline=None, derandomize=True)
    @drawn(_problems(_DTYPES["triton"]))
    def run(given: Problem) -> None:
        with lora_tiles.forced_variant(variant):
            _check(given, "triton")

    run()
