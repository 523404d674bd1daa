"""The adapter's C++ launchers on bare tensors, against float64 and eager in the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.adapter import cpp
from peft_kernels.core import extension, rng
from tests.numerics import assert_as_accurate_as_eager

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
PATHS = pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
SHAPES = [
    pytest.param(1, 1, 1, id="one-of-everything"),
    pytest.param(1, 7, 3, id="one-token"),
    pytest.param(7, 131, 21, id="few-ragged"),  # unpacked without dropout, up to 16 or 32 tokens
    pytest.param(16, 256, 64, id="few-aligned"),
    pytest.param(31, 24, 70, id="few-rank-above-features"),
    pytest.param(33, 50, 5, id="ragged"),
    pytest.param(64, 256, 64, id="aligned"),
    pytest.param(70, 131, 21, id="ragged-blocks"),
    pytest.param(600, 40, 48, id="several-chunks"),
    pytest.param(40, 24, 70, id="rank-above-features"),
]
FUNCTIONS = {
    "identity": lambda t: t,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "mish": F.mish,
}
GRADIENTS = ("dx", "d_down", "d_up", "d_down_bias", "d_up_bias", "d_scale", "d_residual")


@dataclass(frozen=True)
class Problem:
    """Tensors of one call; the residual is x itself where ``residual`` is "input"."""

    x: Tensor
    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | str | None
    scale: float | Tensor
    activation: str
    dropout_p: float
    seed: Tensor
    dy: Tensor


def problem(
    tokens: int,
    features: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    activation: str = "relu",
    dropout_p: float = 0.0,
    scale: str = "number",
    residual: str | None = "input",
    bias: bool = True,
) -> Problem:
    """Return a random problem; ``residual`` may be "other" and ``scale`` "learned" or "channel"."""

    def normal(*size: int, fan: int = 1) -> Tensor:
        return (torch.randn(*size) / fan**0.5).to(dtype)

    scales = {"number": 1.5, "learned": torch.tensor(0.7), "channel": torch.randn(features)}
    return Problem(
        x=normal(tokens, features),
        down=normal(rank, features, fan=features),
        up=normal(features, rank, fan=rank),
        down_bias=normal(rank) if bias else None,
        up_bias=normal(features) if bias else None,
        residual=normal(tokens, features) if residual == "other" else residual,
        scale=scales[scale],
        activation=activation,
        dropout_p=dropout_p,
        seed=torch.randint(-(2**62), 2**62, (1,)),
        dy=normal(tokens, features),
    )


def by_autograd(given: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return y and the gradients of the formula in PyTorch, computed in ``dtype``."""
    leaves = {
        name: value.to(torch.float32 if name == "scale" and dtype != torch.float64 else dtype)
        .detach()
        .requires_grad_()
        for name in ("x", "down", "up", "down_bias", "up_bias", "scale", "residual")
        if isinstance(value := getattr(given, name), Tensor)
    }
    x = leaves["x"]
    scale = leaves.get("scale", given.scale)
    pre = F.linear(x, leaves["down"], leaves.get("down_bias"))
    branch = F.linear(FUNCTIONS[given.activation](pre), leaves["up"], leaves.get("up_bias"))
    if given.dropout_p:
        mask = rng.dropout_mask(given.seed, *x.shape, given.dropout_p)
        branch = branch * mask / (1 - given.dropout_p)
    y = branch * (scale.to(dtype) if isinstance(scale, Tensor) else scale)
    if given.residual is not None:
        y = y + (x if isinstance(given.residual, str) else leaves["residual"])
    order = ("x", "down", "up", "down_bias", "up_bias", "scale", "residual")
    names = [gradient for name, gradient in zip(order, GRADIENTS, strict=True) if name in leaves]
    wanted = [leaves[name] for name in order if name in leaves]
    found = torch.autograd.grad(y, wanted, given.dy.to(dtype))
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


def by_cpp(given: Problem, grad_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return what the launchers write into outputs that start as NaN."""

    def empty(like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        if like is None:
            return None
        return torch.full(like.shape, float("nan"), dtype=dtype or like.dtype)

    x, seed = given.x, given.seed if given.dropout_p else None
    y, pre = empty(x), torch.full((x.shape[0], given.down.shape[0]), float("nan"), dtype=x.dtype)
    residual = x if isinstance(given.residual, str) else given.residual
    assert y is not None
    cpp.forward(
        x, given.down, given.up, given.down_bias, given.up_bias, residual, given.scale,
        given.activation, seed, given.dropout_p, y, pre,
    )  # fmt: skip
    scale = given.scale if isinstance(given.scale, Tensor) else None
    found = {
        "dx": empty(x),
        "d_down": empty(given.down, grad_dtype),
        "d_up": empty(given.up, grad_dtype),
        "d_down_bias": empty(given.down_bias, grad_dtype),
        "d_up_bias": empty(given.up_bias, grad_dtype),
        "d_scale": empty(scale, torch.float32),
    }
    cpp.backward(
        given.dy, x, pre, given.down, given.up, given.down_bias, given.up_bias, given.scale,
        given.activation, seed, given.dropout_p, isinstance(given.residual, str), **found,
    )  # fmt: skip
    return {"y": y, **{name: value for name, value in found.items() if value is not None}}


def check(given: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hold everything to the 1.5x rule and return it."""
    found = by_cpp(given)
    exact, eager = by_autograd(given, torch.float64), by_autograd(given, dtype)
    for name, value in found.items():
        if value.numel() == 1 and given.x.numel() > 1:
            continue  # one number is no sample of an error, see the test of the learned scale
        assert_as_accurate_as_eager(name, value, [eager[name]], exact[name], dtype)
    return found


@pytest.fixture(autouse=True)
def built() -> Iterator[None]:
    """Fail, not skip, without the extension; leave the path for this CPU on."""
    assert extension.why_not() is None
    yield
    extension.load().use_native(True)


@PATHS
@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "features", "rank"), SHAPES)
def test_as_accurate_as_eager(
    tokens: int, features: int, rank: int, dropout_p: float, dtype: torch.dtype, native: bool
) -> None:
    extension.load().use_native(native)
    # Of one element, eager's error may be zero by luck; gelu keeps it from being exactly zero.
    given = problem(tokens, features, rank, dtype=dtype, dropout_p=dropout_p, activation="gelu")
    check(given, dtype)


@DTYPES
@pytest.mark.parametrize("activation", cpp.ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    given = problem(130, 96, 24, dtype=dtype, activation=activation, dropout_p=0.2)
    check(given, dtype)


@pytest.mark.parametrize("activation", cpp.ACTIVATIONS)
def test_activations_at_their_corners(activation: str) -> None:
    """Zero, the bounds of relu6, saturation, infinity and NaN give what PyTorch gives."""
    values = torch.tensor([0.0, -0.0, 6.0, -6.0, 1e-20, 50.0, -50.0, 3e4, -3e4, float("nan")])
    one, rows = torch.ones(1, 1), values[:, None]
    given = Problem(
        rows, one, one, None, None, None, 1.0, activation, 0.0, torch.zeros(1).long(), rows * 0 + 1
    )
    found, exact = by_cpp(given), by_autograd(given, torch.float32)
    for name in ("y", "dx"):
        torch.testing.assert_close(
            found[name],
            exact[name],
            equal_nan=True,
            rtol=2e-6,
            atol=1e-7,
            msg=f"{activation} {name}",
        )


@PATHS
@DTYPES
@pytest.mark.parametrize("scale", ["number", "learned", "channel"])
@pytest.mark.parametrize("residual", ["input", "other", None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "dropout_p"), [(90, 0.25), (15, 0.0)])
def test_scales_residuals_and_biases(
    tokens: int,
    dropout_p: float,
    scale: str,
    residual: str | None,
    bias: bool,
    dtype: torch.dtype,
    native: bool,
) -> None:
    extension.load().use_native(native)
    given = problem(
        tokens, 70, 12, dtype=dtype, scale=scale, residual=residual, bias=bias,
        dropout_p=dropout_p,
    )  # fmt: skip
    check(given, dtype)


@PATHS
@DTYPES
def test_gradient_of_a_learned_scale(dtype: torch.dtype, native: bool) -> None:
    """Over many problems, for the error of one number is luck."""
    extension.load().use_native(native)
    problems = [problem(90, 70, 12, dtype=dtype, scale="learned") for _ in range(24)]
    found = torch.stack([by_cpp(each)["d_scale"] for each in problems])
    exact = torch.stack([by_autograd(each, torch.float64)["d_scale"] for each in problems])
    eager = torch.stack([by_autograd(each, dtype)["d_scale"] for each in problems])
    assert_as_accurate_as_eager("d_scale", found, [eager], exact, dtype)


@PATHS
@DTYPES
def test_the_bottleneck_bias_gradient_is_the_rounded_sum_of_its_rows(
    dtype: torch.dtype, native: bool
) -> None:
    """Its terms may lack fused multiply-adds where the CPU does: its sum must leave them room."""
    extension.load().use_native(native)
    given = problem(200, 70, 21, dtype=dtype, activation="silu")  # of one chunk
    found = by_cpp(given, torch.float32)["d_down_bias"]
    alone = torch.eye(len(given.x), dtype=dtype)[:, :, None]  # the gradient of one row each
    rows = [by_cpp(replace(given, dy=given.dy * one), torch.float32) for one in alone]
    exact = sum(row["d_down_bias"].double() for row in rows)
    assert torch.equal(found, exact.float())


def test_mask_equals_the_specification_bit_for_bit() -> None:
    given = problem(75, 150, 4, activation="sigmoid", dropout_p=0.4, residual=None, bias=False)
    keep = rng.dropout_mask(given.seed, 75, 150, 0.4)
    assert torch.equal(by_cpp(given)["y"] != 0, keep)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "features", "dropout_p"), [(700, 120, 0.1), (15, 2000, 0.0)], ids=["many", "few"]
)
def test_results_do_not_depend_on_the_number_of_threads(
    tokens: int, features: int, dropout_p: float, dtype: torch.dtype
) -> None:
    given = problem(tokens, features, 20, dtype=dtype, dropout_p=dropout_p, scale="learned")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(by_cpp(given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


@PATHS
@DTYPES
@pytest.mark.parametrize(("tokens", "dropout_p"), [(90, 0.1), (13, 0.0)], ids=["many", "few"])
def test_strides_change_no_value_and_inputs_are_not_written(
    tokens: int, dropout_p: float, dtype: torch.dtype, native: bool
) -> None:
    extension.load().use_native(native)
    given = problem(tokens, 70, 6, dtype=dtype, residual="other", dropout_p=dropout_p)
    expected = by_cpp(given)

    def within(value: Tensor) -> Tensor:
        nan = torch.full_like(value, float("nan"))
        return torch.cat([nan, value, nan], 1)[:, 70:140]

    assert isinstance(given.residual, Tensor)
    sliced = {name: within(getattr(given, name)) for name in ("x", "residual", "dy")}
    found = by_cpp(Problem(**{**given.__dict__, **sliced}))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(sliced[name], getattr(given, name)) for name in sliced)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.float16])
def test_gradients_of_another_dtype(grad_dtype: torch.dtype) -> None:
    given = problem(90, 70, 6, dtype=torch.bfloat16)
    wide, exact = by_cpp(given, grad_dtype), by_autograd(given, torch.float64)
    eager = by_autograd(given, torch.bfloat16)
    for name in ("d_down", "d_up", "d_down_bias", "d_up_bias"):
        assert wide[name].dtype == grad_dtype
        assert_as_accurate_as_eager(name, wide[name], [eager[name]], exact[name], torch.bfloat16)


@pytest.mark.parametrize("needed", ["dx", *GRADIENTS[1:6]])
def test_one_gradient_alone_is_what_it_is_among_all(needed: str) -> None:
    given = problem(70, 50, 5, dtype=torch.bfloat16, scale="channel", dropout_p=0.3)
    expected = by_cpp(given)
    pre, y = torch.empty(70, 5, dtype=torch.bfloat16), torch.empty_like(given.x)
    common = (given.scale, given.activation, given.seed, given.dropout_p)
    tensors = (given.down, given.up, given.down_bias, given.up_bias)
    cpp.forward(given.x, *tensors, given.x, *common, y, pre)
    alone: dict[str, Tensor | None] = dict.fromkeys(GRADIENTS[:6])
    written = alone[needed] = torch.full_like(expected[needed], float("nan"))
    cpp.backward(given.dy, given.x, pre, *tensors, *common, True, **alone)
    assert torch.equal(written, expected[needed])
