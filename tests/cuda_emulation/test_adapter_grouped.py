"""Many adapters on the CUDA kernels, on the CPU: equal to the loop over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import adapter, adapter_grouped
from peft_kernels.adapter import cuda
from peft_kernels.core import rng
from tests.adapter.test_grouped import NAMES, SEED, check_grouped, leaves_of, run
from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
# Rows of -1, of adapter 0 and so on. Tiles have 64 rows where there are that many for each adapter.
INDICES = {
    "ragged": (5, 1, 30, 17, 33),
    "ragged-large-tiles": (70, 1, 130),
    "empty-groups": (9, 0, 40, 0, 0),
    "one-group": (0, 0, 70, 0),
    "every-row-its-own": (0, *[1] * 20),
    "one-row": (0, 0, 1),
    "full-tiles": (16, 16, 0, 32),
}


@pytest.fixture(autouse=True)
def emulated(device: build.Emulation) -> build.Emulation:
    return device


def _index(*counts: int) -> Tensor:
    """Return an index with so many rows of -1, of adapter 0 and so on, in random order."""
    numbers = torch.arange(-1, len(counts) - 1)
    return numbers.repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]


def _tensors(
    index: Tensor, adapters: int, features: int, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(len(index), features).to(dtype),
        "down_weight": (torch.randn(adapters, rank, features) / features**0.5).to(dtype),
        "up_weight": (torch.randn(adapters, features, rank) / rank**0.5).to(dtype),
        "down_bias": torch.randn(adapters, rank).to(dtype),
        "up_bias": torch.randn(adapters, features).to(dtype),
    }


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("counts", INDICES.values(), ids=INDICES)
def test_every_index_is_as_accurate_as_the_eager_loop_and_the_same_bits_in_every_order(
    emulated: build.Emulation, counts: tuple[int, ...], p: float, dtype: torch.dtype
) -> None:
    index, adapters = _index(*counts), len(counts) - 1
    tensors, dy = _tensors(index, adapters, 70, 12, dtype), torch.randn(len(index), 70)
    found = check_grouped(tensors, index, dy, "cuda", p)
    for order in ORDERS[1:]:
        emulated.order(*order)
        other = run(leaves_of(tensors), index, dy, "cuda", p)
        assert all(torch.equal(other[name], found[name]) for name in found)
    emulated.order(build.ASCENDING)
    for number in range(adapters):
        has_rows = counts[number + 1] > 0
        assert all((found[name][number] != 0).any() == has_rows for name in NAMES)


@DTYPES
@pytest.mark.parametrize(
    ("features", "rank"), [(64, 16), (41, 3), (24, 70)], ids=["aligned", "unaligned", "wide"]
)
def test_every_shape_is_as_accurate_as_the_eager_loop(
    features: int, rank: int, dtype: torch.dtype
) -> None:
    index = _index(5, 20, 0, 50)
    tensors = _tensors(index, 3, features, rank, dtype)
    check_grouped(tensors, index, torch.randn(len(index), features), "cuda", 0.2)


@DTYPES
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("rows", [60, 200], ids=["small-tiles", "large-tiles"])
def test_a_group_of_all_rows_has_the_bits_of_one_adapter(
    rows: int, number: int, dtype: torch.dtype
) -> None:
    index = torch.full((rows,), number)
    given = leaves_of(_tensors(index, 3, 50, 20, dtype))
    dy = torch.randn(rows, 50).to(dtype)
    found = run(given, index, dy, "cuda", 0.3)
    alone = {"x": given["x"]} | {name: given[name][number] for name in NAMES}
    y = adapter(
        **alone, activation="gelu", scale=1.5, dropout_p=0.3, seed=SEED, backend="cuda"
    )  # fmt: skip
    assert torch.equal(y, found["y"])
    gradients = torch.autograd.grad(y, list(alone.values()), dy)
    assert torch.equal(gradients[0], found["x"])
    if rows > 64:
        return  # the gradients of one adapter alone are summed in parts: other bits
    for name, gradient in zip(NAMES, gradients[1:], strict=True):
        assert torch.equal(gradient, found[name][number])


@DTYPES
@pytest.mark.parametrize("adapters", [2, 6], ids=["large-tiles", "small-tiles"])
def test_the_mask_goes_by_the_number_of_the_row(adapters: int, dtype: torch.dtype) -> None:
    index = _index(30, 50, *[70] * (adapters - 1))
    tensors = _tensors(index, adapters, 75, 4, dtype)
    y = adapter_grouped(
        tensors["x"], tensors["down_weight"], tensors["up_weight"], index, activation="sigmoid",
        residual=None, dropout_p=0.4, seed=SEED, backend="cuda",
    )  # fmt: skip
    keep = rng.dropout_mask(SEED, len(index), 75, 0.4)
    assert torch.equal(y != 0, keep & (index >= 0)[:, None])


@DTYPES
@pytest.mark.parametrize("residual", ["input", "own", None])
def test_rows_without_an_adapter_are_the_residual(residual: str | None, dtype: torch.dtype) -> None:
    """And what they have of a bottleneck is neither written nor read."""
    index = _index(40, 3, 30)
    given = _tensors(index, 2, 35, 6, dtype)
    weights = [given[name] for name in NAMES]
    x, none = given["x"], index < 0
    own = torch.randn_like(x)
    added = {"input": x, "own": own, None: None}[residual]
    y, pre, dx = (torch.full_like(like, float("nan")) for like in (x, x[:, :6], x))
    cuda.forward(x, *weights, added, 1.5, "sigmoid", SEED, 0.3, y, pre, index)
    assert torch.equal(pre.isnan(), none[:, None].expand_as(pre))
    assert torch.equal(y[none], torch.zeros_like(x)[none] if added is None else added[none])
    gradients = [torch.full_like(each, float("nan")) for each in weights]
    cuda.backward(
        own, x, pre, *weights, 1.5, "sigmoid", SEED, 0.3, residual == "input", dx, *gradients,
        None, index,
    )  # fmt: skip
    assert torch.equal(dx[none], own[none] if residual == "input" else torch.zeros_like(x)[none])
    assert all(each.isfinite().all() for each in (y, dx, *gradients))


def test_many_adapters_are_as_many_launches_as_one(emulated: build.Emulation) -> None:
    index = _index(9, *[3] * 12)
    given = leaves_of(_tensors(index, 12, 20, 4, torch.float32))
    emulated.launched()
    run(given, index, torch.randn(len(index), 20), "cuda", 0.3)
    assert emulated.launched() == ["adapter_kernel", "adapter_kernel", "token_reduction_kernel"]
