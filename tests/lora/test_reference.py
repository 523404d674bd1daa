"""The reference is the specification: float64 autograd, peft, and edge cases judge it."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import lora_linear
from tests.lora.problems import check, eager, fused, problem, results


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_every_gradient_passes_gradcheck_in_float64(bias: bool, dropout_p: float) -> None:
    given = problem((2, 3), 5, 7, 2, dtype=torch.float64, bias=bias, dropout_p=dropout_p)
    assert torch.autograd.gradcheck(
        lambda *inputs: fused(given, list(inputs), "reference"), given.inputs()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_as_accurate_as_eager(dtype: torch.dtype, dropout_p: float) -> None:
    check(problem(37, 29, 43, 5, dtype=dtype, dropout_p=dropout_p), "reference", dtype)


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone_is_the_same_as_among_all(needed: int) -> None:
    given = problem(6, 5, 7, 2, dtype=torch.float64, dropout_p=0.2)
    everything = given.inputs()
    expected = results(fused(given, everything, "reference"), everything, given.dy)
    inputs = [t.detach() for t in given.inputs()]
    inputs[needed].requires_grad_()
    (gradient,) = torch.autograd.grad(fused(given, inputs, "reference"), [inputs[needed]], given.dy)
    torch.testing.assert_close(gradient, list(expected.values())[needed + 1])


def test_equals_the_eager_formula_in_float64() -> None:
    given = problem((3, 4), 6, 9, 3, dtype=torch.float64, dropout_p=0.4)
    inputs = given.inputs()
    torch.testing.assert_close(fused(given, inputs, "reference"), eager(given, inputs))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows_give_an_empty_output_and_zero_gradients(
    shape: tuple[int, ...], backend: str | None
) -> None:
    given = problem(shape, 5, 7, 2, dropout_p=0.1)
    inputs = given.inputs()
    found = results(fused(given, inputs, backend), inputs, given.dy)
    assert found["y"].shape == (*shape, 5)
    for name in ("dweight", "da", "db", "dbias"):
        assert found[name].count_nonzero() == 0 and found[name].isfinite().all()
    assert found["dx"].shape == (*shape, 7)


def test_one_dimensional_x() -> None:
    given = problem((), 5, 7, 2)
    inputs = given.inputs()
    assert fused(given, inputs, "reference").shape == (5,)


def test_second_order_gradients_are_refused() -> None:
    given = problem(4, 5, 7, 2, dtype=torch.float64)
    inputs = given.inputs()
    y = fused(given, inputs, "reference")
    (dx,) = torch.autograd.grad(y.square().sum(), [inputs[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_torch_func_is_refused_by_name() -> None:
    given = problem(4, 5, 7, 2)
    x, weight, lora_a, lora_b, bias = (t.detach() for t in given.inputs())
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match=r"does not support torch\.func"):
            transform(lambda t: lora_linear(t, weight, lora_a, lora_b, bias).sum())(x)
