"""The reference is the specification: float64 autograd and edge cases judge it."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.adapter.activations import NAMES, activate, derivative
from tests.adapter.problems import (
    ACTIVATIONS,
    RESIDUALS,
    SCALES,
    check,
    eager,
    fused,
    problem,
    results,
)


def _gradcheck(given) -> bool:  # type: ignore[no-untyped-def]
    names = list(given.tensors)
    return torch.autograd.gradcheck(
        lambda *inputs: fused(given, dict(zip(names, inputs, strict=True)), "reference"),
        list(given.inputs().values()),
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_every_gradient_passes_gradcheck_in_float64(
    scale: str, residual: str | None, dropout_p: float, bias: bool
) -> None:
    assert _gradcheck(
        problem(
            (2, 3), 7, 2, dtype=torch.float64, scale=scale, residual=residual,
            dropout_p=dropout_p, bias=bias,
        )
    )  # fmt: skip


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_activation_passes_gradcheck_in_float64(activation: str, scale: str) -> None:
    # No pre-activation of this problem lies within gradcheck's step of a kink.
    assert _gradcheck(problem(5, 7, 3, dtype=torch.float64, activation=activation, scale=scale))


def test_the_activations_are_the_eleven() -> None:
    assert tuple(ACTIVATIONS) == NAMES and len(NAMES) == 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", NAMES)
def test_value_and_derivative_are_torchs_kinks_and_tails_included(
    activation: str, dtype: torch.dtype
) -> None:
    kinks = [0.0, -0.0, 6.0, -6.0, 1e-4, -1e-4, 30.0, -30.0, 90.0, -90.0]
    x = torch.cat([torch.tensor(kinks), torch.linspace(-9, 9, 181)]).to(dtype).requires_grad_()
    y = ACTIVATIONS[activation](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(activate(activation, x), y)
    unit = torch.finfo(dtype).eps
    # Tails are differences of numbers of order ten.
    torch.testing.assert_close(derivative(activation, x), slope, rtol=8 * unit, atol=32 * unit)


@pytest.mark.parametrize("activation", NAMES)
def test_large_values_saturate(activation: str) -> None:
    """Torch's own float32 derivative of GELU's approximation is no number there."""
    beyond = torch.tensor([1e3, 1e10, 3e38])
    x = torch.cat([beyond, -beyond])
    wide = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](wide).sum(), wide)
    torch.testing.assert_close(derivative(activation, x), slope.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("scale", SCALES)
def test_as_accurate_as_eager(dtype: torch.dtype, dropout_p: float, scale: str) -> None:
    given = problem(37, 43, 5, dtype=dtype, dropout_p=dropout_p, scale=scale, seed=1)
    check(given, "reference", dtype)


@pytest.mark.parametrize("needed", range(7))
def test_each_gradient_alone_is_the_same_as_among_all(needed: int) -> None:
    given = problem(
        6, 7, 2, dtype=torch.float64, dropout_p=0.2, residual="own", scale="channel"
    )  # fmt: skip
    everything = given.inputs()
    expected = results(fused(given, everything, "reference"), everything, given.dy)
    inputs = {name: t.detach() for name, t in given.inputs().items()}
    name = list(inputs)[needed]
    inputs[name].requires_grad_()
    y = fused(given, inputs, "reference")
    (gradient,) = torch.autograd.grad(y, [inputs[name]], given.dy)
    torch.testing.assert_close(gradient, expected[f"d {name}"])


def test_equals_the_eager_formula_in_float64() -> None:
    given = problem((3, 4), 9, 3, dtype=torch.float64, dropout_p=0.4, scale="channel")
    inputs = given.inputs()
    torch.testing.assert_close(fused(given, inputs, "reference"), eager(given, inputs))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows_give_an_empty_output_and_zero_gradients(
    shape: tuple[int, ...], backend: str | None
) -> None:
    given = problem(shape, 7, 2, dropout_p=0.1, scale="learned", residual="own")
    inputs = given.inputs()
    found = results(fused(given, inputs, backend), inputs, given.dy)
    assert found["y"].shape == found["d x"].shape == found["d residual"].shape == (*shape, 7)
    for name in ("down_weight", "up_weight", "down_bias", "up_bias", "scale"):
        assert found[f"d {name}"].shape == inputs[name].shape
        assert (found[f"d {name}"] == 0).all()


def test_one_dimensional_x() -> None:
    given = problem((), 7, 2)
    assert fused(given, given.inputs(), "reference").shape == (7,)


def test_second_order_gradients_are_refused() -> None:
    given = problem(4, 7, 2, dtype=torch.float64)
    inputs = given.inputs()
    y = fused(given, inputs, "reference")
    (dx,) = torch.autograd.grad(y.square().sum(), [inputs["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
