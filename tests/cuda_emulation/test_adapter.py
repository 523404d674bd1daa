"""The adapter's CUDA kernels on the CPU: numerics, edges, layouts, the same bits in every order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_kernels.adapter import cuda
from peft_kernels.adapter.activations import NAMES
from peft_kernels.core import rng
from tests.adapter.activation_rule import assert_activation_as_accurate, by_torch
from tests.adapter.problems import RESIDUALS, SCALES, Problem, check, judge, problem
from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
DROPOUT = pytest.mark.parametrize("dropout_p", [0.0, 0.3])

# Tokens, features, bottleneck. The tiles have 16 rows up to 64 tokens, and 64 beyond.
SHAPES = [
    pytest.param(1, 1, 1, id="one-of-everything"),
    pytest.param(3, 7, 2, id="tiny"),
    pytest.param(32, 128, 64, id="aligned"),
    pytest.param(128, 64, 16, id="aligned-large-tiles"),
    pytest.param(70, 72, 8, id="aligned-ragged-tiles"),
    pytest.param(37, 41, 3, id="unaligned"),
    pytest.param(131, 67, 21, id="unaligned-large-tiles"),
    pytest.param(20, 40, 70, id="bottleneck-of-two-blocks"),
    pytest.param(66, 24, 136, id="bottleneck-of-three-blocks-large-tiles"),
]
PARAMETERS = ("down_weight", "up_weight", "down_bias", "up_bias", "scale")


@pytest.fixture(autouse=True)
def emulated(device: build.Emulation) -> build.Emulation:
    return device


def nans(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape or like.shape, float("nan"), dtype=like.dtype)


def run(given: Problem, wanted: str | None = None) -> dict[str, Tensor]:
    """Return y and the gradients of the launchers, all or one, from outputs filled with NaN."""
    tensors, x = given.tensors, given.x
    down, up, down_bias, up_bias, scale = (tensors.get(name) for name in PARAMETERS)
    assert down is not None and up is not None
    seed = given.seed if given.dropout_p else None
    factor = given.scale if scale is None else scale.float().reshape(-1)
    weights = (down, up, down_bias, up_bias, factor, given.activation, seed, given.dropout_p)
    residual = x if given.input_residual else tensors.get("residual")
    y, pre = nans(x, *x.shape), nans(x, x.shape[0], down.shape[0])
    cuda.forward(x, *weights[:4], residual, *weights[4:], y, pre)
    found = {"d x": nans(x, *x.shape)}
    found |= {f"d {name}": nans(tensors[name]) for name in PARAMETERS if name in tensors}
    if scale is not None:
        found["d scale"] = nans(torch.zeros_like(scale, dtype=torch.float32))
    found = {name: value for name, value in found.items() if wanted in (None, name)}
    out = [found.get(f"d {name}") for name in ("x", *PARAMETERS)]
    cuda.backward(given.dy, x, pre, *weights, given.input_residual, *out)
    return {"y": y} | found


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


def in_every_order(emulated: build.Emulation, given: Problem) -> dict[str, Tensor]:
    """Return the results, which are the same bits in every order of threads and blocks."""
    found = []
    for order in ORDERS:
        emulated.order(*order)
        found.append(run(given))
    emulated.order(build.ASCENDING)
    assert all(equal(found[0], other) for other in found[1:])
    return found[0]


@DTYPES
@DROPOUT
@pytest.mark.parametrize(("tokens", "features", "bottleneck"), SHAPES)
def test_as_accurate_as_eager_and_the_same_bits_in_every_order(
    emulated: build.Emulation,
    tokens: int,
    features: int,
    bottleneck: int,
    dropout_p: float,
    dtype: torch.dtype,
) -> None:
    given = problem(tokens, features, bottleneck, dtype=dtype, dropout_p=dropout_p)
    judge(given, in_every_order(emulated, given), dtype)


@DTYPES
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_form_of_scale_and_residual(
    emulated: build.Emulation, scale: str, residual: str | None, dtype: torch.dtype
) -> None:
    # In float32 enough tokens that the reduction sums them in parts.
    tokens = 140 if dtype == torch.float32 else 35
    given = problem(tokens, 42, 5, dtype=dtype, dropout_p=0.2, scale=scale, residual=residual)
    judge(given, in_every_order(emulated, given), dtype)


@DTYPES
@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    given = problem(33, 40, 20, dtype=dtype, activation=activation)
    judge(given, run(given), dtype)


def by_cuda(activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return act(x) and act'(x), as an adapter of width one with weights of one gives them."""
    one = torch.ones(1, 1)
    given = Problem(
        {"x": x[:, None], "down_weight": one, "up_weight": one}, torch.ones(len(x), 1),
        activation, 1.0, False, 0.0, torch.zeros(1),
    )  # fmt: skip
    found = run(given)
    return found["y"][:, 0], found["d x"][:, 0]


@pytest.mark.parametrize("bound", [1e-30, 1e-3, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("activation", NAMES)
def test_activations_over_the_range_of_float32(activation: str, bound: float) -> None:
    x = torch.linspace(-bound, bound, 1001)
    assert_activation_as_accurate(activation, by_cuda, x)


@pytest.mark.parametrize("activation", NAMES)
def test_activations_beyond_pass_a_nan_and_make_none(activation: str) -> None:
    sizes = torch.tensor([1e3, 1e10, 1e18, 3e38])
    x = torch.cat([sizes, -sizes])
    for found, exact in zip(
        by_cuda(activation, x), by_torch(activation, x, torch.float64), strict=True
    ):
        torch.testing.assert_close(found, exact.float())
    value, _ = by_cuda(activation, torch.tensor([float("nan")]))
    assert value.isnan().all()


@DTYPES
@DROPOUT
@pytest.mark.parametrize("layout", ["row slices", "expanded", "off by one"])
@pytest.mark.parametrize("tokens", [37, 70], ids=["small-tiles", "large-tiles"])
def test_strides_change_no_value(
    tokens: int, layout: str, dropout_p: float, dtype: torch.dtype
) -> None:
    given = problem(
        tokens, 48, 8, dtype=dtype, dropout_p=dropout_p, residual="own", scale="channel"
    )
    activations = {"x": given.x, "dy": given.dy, "residual": given.tensors["residual"]}
    weights: dict[str, Tensor] = {}
    if layout == "row slices":
        activations = {k: torch.cat([nans(t), t], 1)[:, 48:] for k, t in activations.items()}
    elif layout == "expanded":
        activations = {k: t[:1].expand(tokens, 48) for k, t in activations.items()}
    else:
        weights = {name: given.tensors[name] for name in PARAMETERS}
        activations, weights = (
            {k: torch.cat([nans(t, 1), t.flatten()])[1:].view(t.shape) for k, t in each.items()}
            for each in (activations, weights)
        )
    dy = activations.pop("dy")
    strided = replace(given, tensors=given.tensors | activations | weights, dy=dy)
    found = run(strided)
    packed = {name: t.clone().contiguous() for name, t in strided.tensors.items()}
    assert equal(found, run(replace(given, tensors=packed, dy=dy.contiguous())))


@DTYPES
@pytest.mark.parametrize("tokens", [40, 80], ids=["small-tiles", "large-tiles"])
def test_one_gradient_alone_is_what_it_is_among_all(tokens: int, dtype: torch.dtype) -> None:
    given = problem(tokens, 33, 4, dtype=dtype, dropout_p=0.3, scale="channel")
    everything = run(given)
    for name in everything:
        if name != "y":
            assert equal(run(given, name), {name: everything[name]}), name


@DTYPES
def test_no_bias(dtype: torch.dtype) -> None:
    given = problem(70, 33, 4, dtype=dtype, dropout_p=0.3, bias=False, scale="learned")
    judge(given, run(given), dtype)


def test_wider_gradients_are_rounded_once() -> None:
    given = problem(90, 33, 4, dtype=torch.bfloat16)
    narrow = run(given)
    x, down, up, down_bias, up_bias = (
        given.tensors[name] for name in ("x", *PARAMETERS) if name != "scale"
    )
    pre, y = nans(x, 90, 4), nans(x)
    weights = (down, up, down_bias, up_bias)
    common = (given.scale, given.activation, None, 0.0)
    cuda.forward(x, *weights, x, *common, y, pre)
    for wide in (torch.float32, torch.float64):
        out = [nans(weight.to(wide)) for weight in weights]
        cuda.backward(given.dy, x, pre, *weights, *common, True, None, *out, None)
        for name, value in zip(PARAMETERS, out, strict=False):
            assert torch.equal(value.bfloat16(), narrow[f"d {name}"])
            assert not torch.equal(value.bfloat16().to(wide), value)


@DTYPES
def test_a_scale_on_the_device_is_the_number_itself(dtype: torch.dtype) -> None:
    given = problem(40, 33, 4, dtype=dtype, dropout_p=0.3)
    scale = {"scale": torch.tensor(given.scale)}
    learned = run(replace(given, tensors=given.tensors | scale))
    assert equal(learned, run(given))
    channels = {"scale": torch.full((33,), given.scale)}
    channel = run(replace(given, tensors=given.tensors | channels))
    assert torch.equal(channel["y"], learned["y"])
    torch.testing.assert_close(channel["d scale"].sum(), learned["d scale"], rtol=1e-3, atol=1e-3)


def test_launches_and_counters_left_zero(
    emulated: build.Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch forward and two backward, again and again on the same counters."""
    counters = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(cuda.triton_runtime, "counters", lambda device, size: counters[:size])
    given = problem(330, 70, 4, dropout_p=0.3, scale="learned")
    emulated.launched()
    first = run(given)
    assert emulated.launched() == ["adapter_kernel", "adapter_kernel", "token_reduction_kernel"]
    assert not counters.any()
    assert equal(first, run(given))
    run(given, "d x")
    assert emulated.launched()[-2:] == ["adapter_kernel", "adapter_kernel"]
    run(given, "d up_bias")
    assert emulated.launched() == ["adapter_kernel", "token_reduction_kernel"]


@DTYPES
@pytest.mark.parametrize("p", [0.1, 0.999])
@pytest.mark.parametrize("tokens", [40, 75], ids=["small-tiles", "large-tiles"])
def test_mask_equals_the_specification_bit_for_bit(
    tokens: int, p: float, dtype: torch.dtype
) -> None:
    """Weights of the identity make y and dx the dropped x itself."""
    size = 19
    x = (torch.randn(tokens, size).abs() + 1).to(dtype)
    eye, seed = torch.eye(size, dtype=dtype), torch.tensor([-(2**61) + 12345])
    tensors = {"x": x, "down_weight": eye, "up_weight": eye}
    found = run(Problem(tensors, x, "identity", 1.0 - p, False, p, seed))
    expected = rng.dropout_mask(seed, tokens, size, p)
    assert torch.equal(found["y"] != 0, expected)
    assert torch.equal(found["d x"] != 0, expected)


@DTYPES
def test_the_public_function(dtype: torch.dtype) -> None:
    given = problem((3, 25), 41, 5, dtype=dtype, dropout_p=0.25, scale="channel")
    check(given, "cuda", dtype)
