"""``adapter`` as its user meets it: bad input, dtypes, autocast, memory, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels import BackendUnavailable, adapter, explain
from peft_kernels.core import rng
from tests.adapter.problems import check, eager, fused, problem, results
from tests.lora.test_op import _saved_bytes
from tests.numerics import assert_as_accurate_as_eager


def _arguments(**changes: Any) -> dict[str, Any]:
    return {**problem(4, 8, 2).tensors, **changes}


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
    ({"up_weight": None}, TypeError, "up_weight must be a torch.Tensor, got None"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[..., D\]"),
    ({"x": torch.randn(4, 9)}, ValueError, r"x must have shape \[..., 8\].*\[4, 9\]"),
    ({"x": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "x must be float64.*torch.int64"),
    ({"down_weight": torch.randn(2, 8, 1)}, ValueError, r"down_weight must have shape \[r, D\]"),
    ({"down_weight": torch.randn(0, 8)}, ValueError, "down_weight must have at least one row"),
    ({"up_weight": torch.randn(2, 8)}, ValueError, r"up_weight must have shape \[8, 2\].*\[2, 8\]"),
    ({"up_weight": torch.randn(8, 2).to_sparse()}, TypeError, "up_weight must be a dense tensor"),
    ({"down_bias": torch.randn(8)}, ValueError, r"down_bias must have shape \[2\].*\[8\]"),
    ({"up_bias": torch.randn(2)}, ValueError, r"up_bias must have shape \[8\].*\[2\]"),
    ({"up_bias": torch.randn(8, device="meta")}, ValueError, "up_bias is on meta while x is on"),
    ({"activation": "swish"}, ValueError, "one of relu, gelu, gelu_tanh.*identity, got 'swish'"),
    ({"activation": torch.relu}, ValueError, "activation must be one of relu, gelu"),
    ({"scale": "learned"}, TypeError, r"scale must be a number, a 0-d tensor or .*\[8\]"),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
    ({"scale": torch.ones(2)}, ValueError, r"scale .* of shape \[8\].*got shape \[2\]"),
    ({"scale": torch.ones(4, 8)}, ValueError, r"scale .* of shape \[8\].*got shape \[4, 8\]"),
    ({"scale": torch.ones(8, dtype=torch.int64)}, TypeError, "scale must be float64"),
    ({"scale": torch.ones((), device="meta")}, ValueError, "scale is on meta"),
    ({"residual": "output"}, ValueError, "residual must be \"input\".*got 'output'"),
    ({"residual": 1.0}, TypeError, "residual must be \"input\""),
    ({"residual": torch.randn(8)}, ValueError, r"residual must have the shape of x, \[4, 8\]"),
    ({"residual": torch.randn(4, 8).half()}, TypeError, "residual is torch.float16.*autocast"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ({"dropout_p": 2.0, "training": False}, ValueError, r"dropout_p must lie in \[0, 1\)"),
    ({"dropout_p": 0.1, "seed": 7}, TypeError, r"seed must be an int64.*torch.tensor\(\[7\]"),
    ({"backend": "tritn"}, ValueError, "backend must be one of triton, cuda, cpp, reference"),
    ({"backend": "cuda"}, BackendUnavailable, "cuda: serves NVIDIA GPUs"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        adapter(**_arguments(**change))


def test_the_public_name_stays_the_function_beside_the_folder_of_that_name() -> None:
    import peft_kernels.adapter.op

    assert peft_kernels.adapter is adapter


def test_explain_checks_as_the_call_does_and_names_a_reason_against_each_other_backend() -> None:
    said = explain(adapter, **_arguments(), backend="reference", dropout_p=0.1)
    assert said.backend == "reference" and set(said.reasons) == {"triton", "cuda", "cpp"}
    with pytest.raises(ValueError, match="activation must be one of"):
        explain(adapter, **_arguments(activation="swish"))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("scale", ["learned", "channel"])
def test_float32_parameters_beside_bfloat16(dropout_p: float, scale: str) -> None:
    """Parameters are cast down, x is not cast up, gradients come back in float32."""
    given = problem(
        33, 24, 4, dtype=torch.bfloat16, parameter_dtype=torch.float32, dropout_p=dropout_p,
        scale=scale, residual="own",
    )  # fmt: skip
    inputs = given.inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fused(given, inputs, None)
    assert y.dtype == torch.bfloat16
    assert not any(t.dtype == torch.float32 and t.numel() >= given.x.numel() for t in saved)
    found = results(y, inputs, given.dy)
    assert all(found[f"d {name}"].dtype == t.dtype for name, t in inputs.items())
    check(given, "reference", torch.bfloat16)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_own(
    base: torch.dtype, parameters: torch.dtype
) -> None:
    given = problem((3, 5), 8, 2, dtype=base, parameter_dtype=parameters, residual="own")
    inputs = given.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(given, inputs, None)
    assert y.dtype == torch.bfloat16
    found = results(y, inputs, given.dy)
    assert all(found[f"d {name}"].dtype == t.dtype for name, t in inputs.items())
    wide, others = given.inputs(torch.float64), given.inputs(torch.bfloat16)
    exact = results(eager(given, wide), wide, given.dy)
    expected = results(eager(given, others), others, given.dy)
    for name, value in found.items():
        assert_as_accurate_as_eager(name, value, [expected[name]], exact[name], torch.bfloat16)


def test_autocast_leaves_float64_alone() -> None:
    given = problem(4, 8, 2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(given, given.inputs(), None).dtype == torch.float64


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_saved_bytes_are_x_and_a_sixteenth_whatever_the_activation(
    activation: str, dropout_p: float
) -> None:
    given = problem(
        512, 256, 16, dtype=torch.bfloat16, activation=activation, dropout_p=dropout_p
    )  # fmt: skip
    inputs = given.inputs()
    parameters = [t for name, t in inputs.items() if name != "x"]
    saved = _saved_bytes(lambda: fused(given, inputs, None), parameters)
    assert saved <= 1.07 * given.x.numel() * 2
    # What eager keeps, so that the measure is seen to measure.
    assert _saved_bytes(lambda: eager(given, inputs), parameters) > saved or activation == "relu"


def test_the_gradient_of_a_residual_of_its_own_is_dy_itself() -> None:
    given = problem(4, 8, 2, residual="own")
    inputs = given.inputs()
    y = fused(given, inputs, None)
    (found,) = torch.autograd.grad(y, [inputs["residual"]], given.dy)
    assert found.data_ptr() == given.dy.data_ptr()


def test_inputs_are_never_written_to() -> None:
    given = problem(9, 8, 2, dropout_p=0.2, scale="channel", residual="own")
    inputs = given.inputs()
    before = {name: t.detach().clone() for name, t in inputs.items()}
    dy = given.dy.clone()
    fused(given, inputs, None).backward(dy)
    assert all(torch.equal(t, before[name]) for name, t in inputs.items())
    assert torch.equal(dy, given.dy)


def test_dropout_drops_the_branch_alone_by_the_specified_mask() -> None:
    given = problem(35, 19, 3, dropout_p=0.4, residual="own")
    y = fused(given, given.inputs(), None)
    kept = (y - given.tensors["residual"]) != 0
    assert torch.equal(kept, rng.dropout_mask(given.seed, 35, 19, 0.4))


def test_dropout_follows_manual_seed_and_differs_between_calls() -> None:
    arguments = _arguments(dropout_p=0.5)
    torch.manual_seed(5)
    first, second = adapter(**arguments), adapter(**arguments)
    torch.manual_seed(5)
    assert torch.equal(first, adapter(**arguments))
    assert not torch.equal(first, second)


def test_evaluation_ignores_dropout_and_leaves_the_generator_alone() -> None:
    expected = adapter(**_arguments())
    state = torch.get_rng_state()
    assert torch.equal(adapter(**_arguments(), dropout_p=0.5, training=False), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_gradients_of_the_run_without(
    use_reentrant: bool,
) -> None:
    given = problem(9, 8, 2)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        inputs = given.inputs()

        def run(*tensors: Tensor) -> Tensor:
            return adapter(*tensors, scale=1.5, dropout_p=0.4, activation="silu").tanh()

        tensors = list(inputs.values())
        if checkpointed:
            y = checkpoint(run, *tensors, use_reentrant=use_reentrant)
        else:
            y = run(*tensors)
        y.backward(given.dy)
        found.append([y, *(t.grad for t in tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_weight_that_changed_in_place_before_backward_raises() -> None:
    given = problem(4, 8, 2)
    inputs = given.inputs()
    y = fused(given, inputs, None)
    with torch.no_grad():
        inputs["down_weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(given.dy)


def test_strides_and_leading_dimensions_change_nothing() -> None:
    given = problem((3, 5), 8, 2, scale="channel", residual="own")
    plain = given.inputs()
    expected = results(fused(given, plain, None), plain, given.dy)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]

    inputs = {name: strided(t).detach().requires_grad_() for name, t in given.tensors.items()}
    dy = given.dy.transpose(0, 1).contiguous().transpose(0, 1)
    found = results(fused(given, inputs, None), inputs, dy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_meta_tensors_give_shapes() -> None:
    arguments = {name: value.to("meta") for name, value in _arguments().items()}
    assert adapter(**arguments).shape == (4, 8)


def test_cpp_is_what_runs_on_a_cpu_by_default() -> None:
    x, down, up = torch.randn(4, 8), torch.randn(2, 8), torch.randn(8, 2)
    assert explain(adapter, x, down, up).backend == "cpp"
    assert explain(adapter, x.half(), down.half(), up.half()).backend == "reference"
