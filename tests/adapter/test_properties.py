"""Any shape, bottleneck, layout and option, on every backend that runs here, against float64.

The bound is the standard one for a rounded sum: a few rounding units of the sum of magnitudes. A
wrong index, mask or edge is far outside it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import adapter, explain
from peft_kernels.adapter.activations import NAMES
from tests.adapter.problems import RESIDUALS, SCALES, Problem, eager, fused, problem, results

_DTYPES = {
    "reference": [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    "cpp": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.float16],
}


def _serves(backend: str) -> bool:
    tensors = problem(1, 1, 1).tensors
    return explain(adapter, **tensors, backend=backend).backend == backend


@st.composite
def _problems(draw: st.DrawFn, dtypes: list[torch.dtype], most: int) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    size = st.integers(1, most)
    leading = draw(st.sampled_from([(), (1,), (2, 3), (0,)])) + (draw(size),)
    given = problem(
        leading,
        draw(size),
        draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 64, 65, 257]))),
        activation=draw(st.sampled_from(NAMES)),
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from([dtype, torch.float32]))
        if dtype.itemsize == 2
        else None,
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.75])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
        residual=draw(st.sampled_from(RESIDUALS)),
        seed=draw(st.integers(0, 2**16)),
    )
    given = replace(given, scale=draw(st.sampled_from([0.0, 1.0, -2.5])))
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
    changed = {name: change(t) if t.dim() else t for name, t in given.tensors.items()}
    return replace(given, tensors=changed, dy=change(given.dy))


def _magnitudes(given: Problem) -> dict[str, Tensor]:
    """Return a bound of every result with all its terms made positive.

    No activation's value or slope passes |x| + 1.2 and 1.2: with h and the slope so replaced, the
    same formula on absolute values bounds the sum of magnitudes.
    """
    inputs = {name: t.detach().abs() for name, t in given.inputs(torch.float64).items()}
    x = inputs["x"].flatten(0, -2)
    down, up = inputs["down_weight"], inputs["up_weight"]
    down_bias, up_bias = inputs.get("down_bias", 0.0), inputs.get("up_bias", 0.0)
    scale = inputs.get("scale", torch.tensor(abs(given.scale), dtype=torch.float64))
    scale = scale / (1.0 - given.dropout_p)
    dy = given.dy.double().abs().flatten(0, -2)
    hidden = x @ down.t() + down_bias + 1.2
    branch = hidden @ up.t() + up_bias
    residual = x if given.input_residual else inputs.get("residual", torch.zeros(()))
    dpre = 1.2 * ((scale * dy) @ up)
    # An error of h or of the slope grows with what it came from.
    by_channel = (dy * branch).sum(0) / (1.0 - given.dropout_p)
    found = {
        "y": scale * branch + residual.reshape(-1, x.shape[1])
        if residual.dim()
        else scale * branch,
        "d x": dpre @ down + (dy if given.input_residual else 0.0),
        "d down_weight": dpre.t() @ x,
        "d up_weight": (scale * dy).t() @ hidden,
        "d down_bias": dpre.sum(0),
        "d up_bias": (scale * dy).sum(0),
        "d residual": dy,
        "d scale": by_channel,
    }
    if "scale" in inputs and not inputs["scale"].dim():
        found["d scale"] = by_channel.sum()
    return found


def _growth(given: Problem) -> Tensor:
    """Return how much larger the pre-activations' magnitudes are than 1: slopes bend with them."""
    x = given.x.double().abs().flatten(0, -2)
    return 1.0 + (x @ given.tensors["down_weight"].double().abs().t()).amax() if x.numel() else 1.0


def _check(given: Problem, backend: str) -> None:
    wide = given.inputs(torch.float64)
    exact = results(eager(given, wide), wide, given.dy)
    magnitude = _magnitudes(given)
    inputs = given.inputs()
    found = results(fused(given, inputs, backend), inputs, given.dy)
    assert found.keys() == exact.keys()
    # The float64 measure is rounded too: where float64 is judged, both errors count.
    unit = torch.finfo(given.x.dtype).eps * (2 if given.x.dtype == torch.float64 else 1)
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        error = (value.double() - exact[name]).abs()
        bound = 3 * unit * _growth(given) * magnitude[name].reshape(exact[name].shape)
        assert (error <= bound + 1e-30).all(), (
            f"{name}: error {error.max():.2e} is {(error / (bound + 1e-30)).max():.1f} bounds"
        )


# The slopes of relu, leaky_relu and relu6 jump: a pre-activation that rounds across a kink gives
# another gradient, rightly. None of these problems has one, or the bound would tell.
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_any_call_agrees_with_float64(backend: str) -> None:
    if not _serves(backend):
        pytest.skip(f"the {backend} backend does not run here: see python -m peft_kernels env")

    @settings(max_examples=80, deadline=None, derandomize=True)
    @drawn(_problems(_DTYPES[backend], 70))
    def run(given: Problem) -> None:
        _check(given, backend)

    run()


@pytest.mark.timeout(300)
def test_any_call_agrees_with_float64_in_the_triton_interpreter() -> None:
    if not _serves("triton"):
        pytest.skip("Triton interprets CPU tensors only under TRITON_INTERPRET=1")

    @settings(max_examples=12, deadline=None, derandomize=True)
    @drawn(_problems(_DTYPES["triton"], 40))
    def run(given: Problem) -> None:
        _check(given, "triton")

    run()
