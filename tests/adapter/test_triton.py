"""The Triton kernels in the interpreter: numerics, edges, launches, repeatability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from peft_kernels import explain
from peft_kernels.adapter.activations import NAMES
from peft_kernels.core import adapter_tiles, rng, tiles, triton_runtime
from tests.adapter.problems import RESIDUALS, SCALES, check, eager, fused, problem, results

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    pytest.mark.timeout(120),
]
DTYPES = [torch.float32, torch.float16]
SHAPES = [
    pytest.param(1, 1, 1, id="one-of-everything"),
    pytest.param(1, 7, 1, id="one-token"),
    pytest.param(64, 64, 16, id="aligned"),
    pytest.param(33, 50, 3, id="ragged"),
    pytest.param(40, 36, 33, id="two-rank-blocks"),
    pytest.param(20, 24, 70, id="bottleneck-above-the-features"),
    pytest.param(150, 20, 3, id="tokens-in-parts"),
]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_both_orders_of_the_second_pass_give_the_same_bits(
    residual: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last columns first, with what is added loaded ahead, is Hopper's form."""
    given = problem(40, 100, 24, residual=residual, scale=scale, dropout_p=0.3)
    found = []
    for ahead in (True, False):
        tile = replace(adapter_tiles._INTERPRETED, ahead=ahead)
        monkeypatch.setattr(adapter_tiles, "_INTERPRETED", tile)
        inputs = given.inputs()
        found.append(results(fused(given, inputs, "triton"), inputs, given.dy))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("tokens", [1, 33, 150])
def test_what_hopper_is_told_of_loops_holds(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter checks assumptions: that loops run, in backward under dropout."""
    given = problem(tokens, 20, 3, dropout_p=0.3)
    from peft_kernels.adapter import launch as adapter_launch
    from peft_kernels.core import token_reduction

    found, told = [], []
    launched = adapter_launch.launch

    def noted(kernel: Any, *args: Any, **named: Any) -> None:
        told.append(named.get("WGMMA", False))
        launched(kernel, *args, **named)

    monkeypatch.setattr(adapter_launch, "launch", noted)
    for hopper in (False, True):
        monkeypatch.setattr(tiles, "wgmma", lambda device, answer=hopper: answer)
        monkeypatch.setattr(token_reduction, "wgmma", lambda device, answer=hopper: answer)
        inputs = given.inputs()
        found.append(results(fused(given, inputs, "triton"), inputs, given.dy))
    assert told == [False, False, False, True]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "features", "bottleneck"), SHAPES)
def test_as_accurate_as_eager(
    tokens: int, features: int, bottleneck: int, dropout_p: float, dtype: torch.dtype
) -> None:
    check(problem(tokens, features, bottleneck, dtype=dtype, dropout_p=dropout_p), "triton", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_form_of_scale_and_residual(
    scale: str, residual: str | None, dtype: torch.dtype
) -> None:
    # In float32 enough tokens that the reduction sums them in parts.
    tokens = 140 if dtype == torch.float32 else 35
    given = problem(tokens, 42, 5, dtype=dtype, dropout_p=0.2, scale=scale, residual=residual)
    check(given, "triton", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    check(problem(33, 40, 20, dtype=dtype, activation=activation), "triton", dtype)


# NumPy, which interprets the kernels, warns where e^-x passes the largest float on its way to 0.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", NAMES)
def test_value_and_derivative_are_torchs_kinks_and_tails_included(activation: str) -> None:
    """Identity weights make h of the pre-activations and dx of the derivative."""
    kinks = [0.0, -0.0, 6.0, -6.0, 1e-4, -1e-4, 0.25, 30.0, -30.0, 90.0, -90.0]
    x = torch.cat([torch.tensor(kinks), torch.linspace(-9, 9, 85)]).view(-1, 16)
    eye = torch.eye(16)
    given = problem(6, 16, 16, activation=activation, residual=None, bias=False)
    tensors = {"x": x, "down_weight": eye, "up_weight": eye}
    given = replace(given, tensors=tensors, scale=1.0, dy=torch.ones(6, 16))
    found, expected = (
        results(call(given, inputs), inputs, given.dy)
        for call in (lambda g, i: fused(g, i, "triton"), eager)
        for inputs in [given.inputs()]
    )
    unit = torch.finfo(torch.float32).eps
    for name in ("y", "d x"):
        torch.testing.assert_close(found[name], expected[name], rtol=8 * unit, atol=32 * unit)


@pytest.mark.parametrize("bias", [{"down_bias"}, {"up_bias"}, set()], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_each_bias_may_be_absent(bias: set[str], scale: str) -> None:
    given = problem(33, 40, 5, scale=scale, dropout_p=0.2)
    absent = {"down_bias", "up_bias"} - bias
    kept = {name: t for name, t in given.tensors.items() if name not in absent}
    check(replace(given, tensors=kept), "triton", torch.float32)


@pytest.mark.parametrize("bottleneck", [256, 300])
def test_wide_bottlenecks(bottleneck: int) -> None:
    """256 is the widest that one program holds; above, the products are the library's."""
    check(problem(5, 24, bottleneck, dropout_p=0.2), "triton", torch.float32)


def test_explain_says_that_wide_bottlenecks_are_the_librarys() -> None:
    from peft_kernels import adapter

    plans = []
    for bottleneck in (256, 257):
        given = problem(4, 24, bottleneck)
        said = explain(adapter, **given.tensors, backend="triton")
        plans.append(str(said.plan))
    assert plans[0].startswith("forward fused") and "above 256" in plans[1]


def test_float32_parameters_beside_float16_get_float32_gradients() -> None:
    given = problem(
        33, 24, 4, dtype=torch.float16, parameter_dtype=torch.float32, dropout_p=0.2,
        scale="channel",
    )  # fmt: skip
    found = check(given, "triton", torch.float16)
    names = ("down_weight", "up_weight", "down_bias", "up_bias", "scale")
    assert {found[f"d {name}"].dtype for name in names} == {torch.float32}
    assert found["y"].dtype == found["d x"].dtype == torch.float16
    # Summed and returned in float32: more than float16 could hold.
    down = found["d down_weight"]
    assert not torch.equal(down, down.half().float())


@pytest.mark.parametrize("bottleneck", [19, 300])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_mask_equals_the_specification_bit_for_bit(p: float, bottleneck: int) -> None:
    features, tokens = 19, 35
    given = problem(tokens, features, bottleneck, dropout_p=p, residual=None, bias=False)
    given = replace(given, seed=torch.tensor([-(2**61) + 12345]), dy=torch.ones(tokens, features))
    inputs = given.inputs()
    expected = rng.dropout_mask(given.seed, tokens, features, p)
    y = fused(given, inputs, "triton")
    assert torch.equal(y != 0, expected)
    # Backward: h = 1 and up = identity give the mask's column sums in d_up.
    inputs["up_bias"] = torch.zeros(features, requires_grad=True)
    (d_up_bias,) = torch.autograd.grad(
        fused(given, inputs, "triton"), [inputs["up_bias"]], given.dy
    )
    torch.testing.assert_close(d_up_bias, expected.sum(0) * (given.scale / (1.0 - p)))


@pytest.mark.parametrize("scale", SCALES)
def test_every_output_element_is_written(scale: str, poisoned_allocations: None) -> None:
    given = problem(33, 50, 3, dropout_p=0.3, scale=scale, residual="own")
    check(given, "triton", torch.float32)


def test_nothing_outside_an_output_is_written() -> None:
    """The launchers get views in the middle of a guarded buffer."""
    from peft_kernels.adapter import launch

    given = problem(33, 50, 3, dropout_p=0.3, scale="channel")
    x, down, up, down_bias, up_bias, scale = given.tensors.values()
    rest = (scale, "gelu", given.seed, given.dropout_p)

    def guarded(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.Size(size).numel()
        buffer = torch.full((count + 512,), 77.0)
        return buffer, buffer[256 : 256 + count].view(size)

    y, pre = guarded(33, 50), guarded(33, 3)
    launch.adapter_forward(x, down, up, down_bias, up_bias, x, *rest, y[1], pre[1])
    sizes = ((33, 50), (3, 50), (50, 3), (3,), (50,), (50,))
    outputs = [guarded(*size) for size in sizes]
    launch.adapter_backward(
        given.dy, x, pre[1], down, up, down_bias, up_bias, *rest, True,
        *(view for _, view in outputs),
    )  # fmt: skip
    for buffer, view in (y, pre, *outputs):
        assert (buffer[:256] == 77.0).all() and (buffer[-256:] == 77.0).all()
        assert not (view == 77.0).any()


@pytest.mark.parametrize("scale", SCALES)
def test_runs_repeat_bit_for_bit(scale: str) -> None:
    given = problem(130, 40, 5, dropout_p=0.2, scale=scale)
    first, second = (
        results(fused(given, inputs, "triton"), inputs, given.dy)
        for inputs in (given.inputs(), given.inputs())
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_launch_forward_and_two_backward(
    dropout_p: float, scale: str, launches: list[str]
) -> None:
    given = problem(40, 24, 4, dropout_p=dropout_p, scale=scale)
    inputs = given.inputs()
    y = fused(given, inputs, "triton")
    assert launches == ["_adapter_forward_kernel"]
    launches.clear()
    y.backward(given.dy)
    assert launches == ["_adapter_backward_kernel", "_token_reduction_kernel"]


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ({"x"}, ["_adapter_backward_kernel"]),
        ({"up_bias"}, ["_token_reduction_kernel"]),
        ({"residual"}, []),
        ({"up_weight"}, ["_adapter_backward_kernel", "_token_reduction_kernel"]),
    ],
    ids=str,
)
def test_what_is_frozen_is_not_launched(
    trained: set[str], expected: list[str], launches: list[str]
) -> None:
    given = problem(40, 24, 4, dropout_p=0.1, residual="own")
    inputs = given.inputs()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    y = fused(given, inputs, "triton")
    launches.clear()
    y.backward(given.dy)
    assert launches == expected


@pytest.mark.parametrize("needed", range(7))
def test_each_gradient_alone_is_the_same_as_among_all(needed: int) -> None:
    given = problem(70, 40, 5, dropout_p=0.2, residual="own", scale="learned")
    everything = given.inputs()
    expected = results(fused(given, everything, "triton"), everything, given.dy)
    inputs = {name: t.detach() for name, t in given.inputs().items()}
    name = list(inputs)[needed]
    inputs[name].requires_grad_()
    y = fused(given, inputs, "triton")
    (gradient,) = torch.autograd.grad(y, [inputs[name]], given.dy)
    # Another number of parts may add in another order.
    torch.testing.assert_close(gradient, expected[f"d {name}"], rtol=1e-5, atol=1e-5)


def test_counters_are_zero_again_after_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer over many launches, as on a GPU stream: a stale counter would show."""
    cases = [problem(130, 50, 40, dropout_p=0.3, seed=i, scale=SCALES[i]) for i in range(3)]

    def run_all() -> list[dict[str, torch.Tensor]]:
        every = [(given, given.inputs()) for given in cases]
        return [
            results(fused(given, inputs, "triton"), inputs, given.dy) for given, inputs in every
        ]

    expected = run_all()
    buffer = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(triton_runtime, "counters", lambda device, size: buffer)
    found = run_all()
    assert buffer.count_nonzero() == 0
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", ["row slices", "expanded rows"])
def test_strides_change_no_bit(layout: str) -> None:
    given = problem(40, 24, 4, dropout_p=0.1, residual="own")
    x, residual, dy = given.x, given.tensors["residual"], given.dy
    if layout == "row slices":
        x, residual, dy = (
            torch.cat([t, torch.full_like(t, float("nan"))], 1)[:, :24] for t in (x, residual, dy)
        )
        assert x.stride() == dy.stride() == (48, 1)
    else:
        x, residual, dy = (t[:1].expand(40, 24) for t in (x, residual, dy))
    strided = replace(given, tensors=given.tensors | {"x": x, "residual": residual}, dy=dy)
    packed = replace(
        given,
        tensors=given.tensors | {"x": x.contiguous(), "residual": residual.contiguous()},
        dy=dy.contiguous(),
    )
    found, expected = (
        results(fused(each, inputs, "triton"), inputs, each.dy)
        for each in (strided, packed)
        for inputs in [each.inputs()]
    )
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_scale_in_a_tensor_gives_what_a_number_gives(dropout_p: float) -> None:
    given = problem(20, 24, 4, dropout_p=dropout_p)
    number, tensor = given.inputs(), given.inputs()
    one = results(fused(given, number, "triton"), number, given.dy)
    tensor["scale"] = torch.tensor(given.scale, requires_grad=True)
    other = results(fused(given, tensor, "triton"), tensor, given.dy)
    assert all(torch.equal(other[name], value) for name, value in one.items())
