"""LoRA's CUDA kernels on the CPU: numerics, edges, layouts, the same bits in every order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_kernels.core import rng
from peft_kernels.lora import cuda
from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS
from tests.lora.problems import Problem, eager, judge, problem, results

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
DROPOUT = pytest.mark.parametrize("dropout_p", [0.0, 0.3])

# Tokens, out features, in features, rank.
SHAPES = [
    pytest.param(1, 1, 1, 1, id="one-of-everything"),
    pytest.param(3, 7, 5, 2, id="tiny"),
    pytest.param(64, 64, 96, 16, id="aligned"),
    pytest.param(70, 72, 80, 8, id="aligned-ragged-tiles"),
    pytest.param(67, 33, 41, 3, id="unaligned"),
    pytest.param(20, 40, 24, 70, id="rank-of-two-blocks"),
]


@pytest.fixture(autouse=True)
def emulated(device: build.Emulation) -> build.Emulation:
    return device


def nans(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape or like.shape, float("nan"), dtype=like.dtype)


def run(given: Problem, scale: float | Tensor | None = None) -> dict[str, Tensor]:
    """Return y and the gradients of the launchers, from outputs filled with NaN."""
    x, weight, a, b, bias, dy = (
        given.x, given.weight, given.lora_a, given.lora_b, given.bias, given.dy,
    )  # fmt: skip
    seed = given.seed if given.dropout_p else None
    factor = given.scale if scale is None else scale
    y, s = nans(x, x.shape[0], weight.shape[0]), nans(x, x.shape[0], a.shape[0])
    cuda.forward(x, weight, a, b, bias, seed, factor, given.dropout_p, y, s)
    dx, da, db = nans(x, *x.shape), nans(a, *a.shape), nans(b, *b.shape)
    dbias = None if bias is None else nans(bias)
    cuda.backward(dy, x, s, weight, a, b, seed, factor, given.dropout_p, dx, da, db, dbias, None)
    found = {"y": y, "dx": dx, "da": da, "db": db}
    return found if dbias is None else found | {"dbias": dbias}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@DTYPES
@DROPOUT
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), SHAPES)
def test_as_accurate_as_eager_and_the_same_bits_in_every_order(
    emulated: build.Emulation,
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dropout_p: float,
    dtype: torch.dtype,
) -> None:
    given = problem(tokens, out_features, in_features, rank, dtype=dtype, dropout_p=dropout_p)
    found = []
    for order in ORDERS:
        emulated.order(*order)
        found.append(run(given))
    emulated.order(build.ASCENDING)
    judge(given, found[0], dtype)
    assert all(equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("deep", ["in", "out", "tokens"])
def test_float_sums_lose_no_more_the_deeper_they_are(deep: str) -> None:
    sizes = {"tokens": 20, "out": 20, "in": 20} | {deep: 6000}
    given = problem(sizes["tokens"], sizes["out"], sizes["in"], 4)
    wide = given.inputs(torch.float64)
    exact = results(eager(given, wide), wide, given.dy)
    # A CPU's eager is no measure here: its error grows with the depth as well.
    for name, value in run(given).items():
        error, size = (
            t.double().square().mean().sqrt() for t in (value - exact[name], exact[name])
        )
        assert error <= 3 * torch.finfo(torch.float32).eps / 2 * size, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@DROPOUT
@pytest.mark.parametrize("features", [(136, 72), (131, 67)], ids=["aligned", "unaligned"])
def test_large_tiles(
    emulated: build.Emulation, features: tuple[int, int], dropout_p: float, dtype: torch.dtype
) -> None:
    """More tiles of 128 x 128 than multiprocessors, in forward and in backward."""
    given = problem(260, *features, 5, dtype=dtype, dropout_p=dropout_p)
    found = []
    for order in (ORDERS[0], ORDERS[3]):
        emulated.order(*order)
        found.append(run(given))
    emulated.order(build.ASCENDING)
    judge(given, found[0], dtype)
    assert equal(*found)


@DTYPES
def test_tokens_summed_in_several_parts(emulated: build.Emulation, dtype: torch.dtype) -> None:
    given = problem(330, 9, 17, 3, dtype=dtype, dropout_p=0.3)
    found = []
    for order in ORDERS:
        emulated.order(*order)
        emulated.resident(7)
        found.append(run(given))
    emulated.order(build.ASCENDING)
    emulated.resident(0)
    judge(given, found[0], dtype)
    assert all(equal(found[0], other) for other in found[1:])


@DTYPES
@DROPOUT
@pytest.mark.parametrize("layout", ["column-major weight", "row slices", "expanded", "off by one"])
def test_strides_change_no_value(layout: str, dropout_p: float, dtype: torch.dtype) -> None:
    given = problem(37, 40, 48, 8, dtype=dtype, dropout_p=dropout_p)
    x, weight, dy = given.x, given.weight, given.dy
    if layout == "column-major weight":
        weight = weight.t().contiguous().t()
    elif layout == "row slices":
        x = torch.cat([nans(x), x], 1)[:, 48:]
        dy = torch.cat([dy, nans(dy)], 1)[:, :40]
        weight = torch.cat([weight, nans(weight)], 1)[:, :48]
    elif layout == "expanded":
        x, dy = x[:1].expand(37, 48), dy[:1].expand(37, 40)
    else:
        x, weight, dy = (
            torch.cat([nans(t, 1), t.flatten()])[1:].view(t.shape) for t in (x, weight, dy)
        )
    strided = replace(given, x=x, weight=weight, dy=dy)
    found = run(strided)
    judge(strided, found, dtype)
    packed = replace(given, x=x.contiguous(), weight=weight.contiguous(), dy=dy.contiguous())
    # A column-major weight is multiplied in the same order too.
    assert equal(found, run(packed))


@DTYPES
def test_no_bias_and_gradients_that_are_not_wanted(dtype: torch.dtype) -> None:
    given = problem(40, 33, 21, 4, dtype=dtype, dropout_p=0.3, bias=False)
    everything = run(given)
    judge(given, everything, dtype)
    x, a, b, dy = given.x, given.lora_a, given.lora_b, given.dy
    s = nans(x, 40, 4)
    arguments = (given.weight, a, b, given.seed, given.scale, given.dropout_p)
    cuda.forward(x, given.weight, a, b, None, given.seed, given.scale, 0.3, nans(dy, 40, 33), s)
    for name in ("dx", "da", "db"):
        out = nans(everything[name])
        wanted = [out if each == name else None for each in ("dx", "da", "db")]
        cuda.backward(dy, x, s, *arguments, *wanted, None, None)
        assert torch.equal(out, everything[name]), name


def test_wider_gradients_are_rounded_once() -> None:
    given = problem(90, 33, 41, 4, dtype=torch.bfloat16)
    narrow = run(given)
    s = nans(given.x, 90, 4)
    rest = (given.weight, given.lora_a, given.lora_b, None, given.scale, 0.0)
    bias = given.bias
    y = nans(given.x, 90, 33)
    cuda.forward(given.x, given.weight, given.lora_a, given.lora_b, bias, None, 1.5, 0.0, y, s)
    for wide in (torch.float32, torch.float64):
        da, db = given.lora_a.to(wide), given.lora_b.to(wide)
        dbias = torch.zeros(33, dtype=wide)
        cuda.backward(given.dy, given.x, s, *rest, None, da, db, dbias, None)
        for name, value in (("da", da), ("db", db), ("dbias", dbias)):
            assert torch.equal(value.bfloat16(), narrow[name])
            assert not torch.equal(value.bfloat16().to(wide), value)


def test_a_scale_on_the_device_is_the_number_itself() -> None:
    given = problem(40, 33, 21, 4, dropout_p=0.3)
    assert equal(run(given), run(given, torch.tensor(given.scale)))


def test_launches_and_counters_left_zero(
    emulated: build.Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch forward and two backward, again and again on the same counters."""
    counters = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(cuda.triton_runtime, "counters", lambda device, size: counters[:size])
    given = problem(330, 70, 90, 4, dropout_p=0.3)
    emulated.launched()
    first = run(given)
    assert emulated.launched() == ["lora_kernel", "lora_kernel", "token_reduction_kernel"]
    assert not counters.any()
    assert equal(first, run(given))


@pytest.mark.parametrize("p", [0.1, 0.999])
@DTYPES
def test_mask_equals_the_specification_bit_for_bit(p: float, dtype: torch.dtype) -> None:
    """A = identity and scale = 1 - p make s the dropped x itself, in both directions."""
    tokens, size = 75, 19
    x = (torch.randn(tokens, size).abs() + 1).to(dtype)
    eye, zeros = torch.eye(size, dtype=dtype), torch.zeros(size, size, dtype=dtype)
    given = problem(tokens, size, size, size, dtype=dtype, dropout_p=p, bias=False)
    seed = torch.tensor([-(2**61) + 12345])
    given = replace(
        given, x=x, weight=zeros, lora_a=eye, lora_b=eye, scale=1.0 - p, seed=seed, dy=x
    )
    found, expected = run(given), rng.dropout_mask(seed, tokens, size, p)
    assert torch.equal(found["y"] != 0, expected)
    assert torch.equal(found["dx"] != 0, expected)


@DTYPES
def test_infinities_and_nans_spoil_their_own_rows_alone(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf")):
        given = problem(70, 40, 41, 4, dtype=dtype)
        x, dy = given.x.clone(), given.dy.clone()
        x[2, 17] = dy[66, 5] = value
        found = run(replace(given, x=x, dy=dy))
        assert not found["y"][2].isfinite().any() and not found["dx"][66].isfinite().any()
        assert found["y"].isfinite().all(1).sum() == found["dx"].isfinite().all(1).sum() == 69
