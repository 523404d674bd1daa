"""Many adapters on the C++ backend: both dtypes and code paths, and every shape of an index."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peft_kernels import adapter, adapter_grouped
from peft_kernels.adapter import cpp
from peft_kernels.core import extension, rng
from tests.adapter.test_grouped import NAMES, SEED, check_grouped, leaves_of, run

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
PATHS = pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])


def _counts(*counts: int) -> Tensor:
    """Return an index with so many rows of -1, of adapter 0 and so on, in random order."""
    numbers = torch.arange(-1, len(counts) - 1)
    return numbers.repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]


INDICES = {
    "ragged": (5, 1, 60, 17, 33),
    "empty-groups": (9, 0, 40, 0, 0),
    "one-group": (0, 0, 70, 0),
    "every-row-its-own": (0, *[1] * 40),
    "one-row": (0, 0, 1),
    "one-row-among-many": (50, 0, 1),
    "several-chunks": (40, 300, 10, 450),
}
SHAPES = {"ragged": (50, 5), "aligned": (128, 32), "ragged-blocks": (131, 21), "wide": (24, 70)}


@pytest.fixture(autouse=True)
def built() -> Iterator[None]:
    """Fail, not skip, without the extension; leave the path for this CPU on."""
    assert extension.why_not() is None
    yield
    extension.load().use_native(True)


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


@PATHS
@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("counts", INDICES.values(), ids=INDICES)
def test_every_index_is_as_accurate_as_the_eager_loop(
    counts: tuple[int, ...], p: float, dtype: torch.dtype, native: bool
) -> None:
    extension.load().use_native(native)
    index, adapters = _counts(*counts), len(counts) - 1
    tensors = _tensors(index, adapters, 70, 12, dtype)
    found = check_grouped(tensors, index, torch.randn(len(index), 70), "cpp", p)
    for number in range(adapters):
        has_rows = counts[number + 1] > 0
        assert all((found[name][number] != 0).any() == has_rows for name in NAMES)


@PATHS
@DTYPES
@pytest.mark.parametrize(("features", "rank"), SHAPES.values(), ids=SHAPES)
def test_every_shape_is_as_accurate_as_the_eager_loop(
    features: int, rank: int, dtype: torch.dtype, native: bool
) -> None:
    extension.load().use_native(native)
    index = _counts(5, 20, 0, 50)
    tensors = _tensors(index, 3, features, rank, dtype)
    check_grouped(tensors, index, torch.randn(len(index), features), "cpp", 0.2)


@PATHS
@DTYPES
@pytest.mark.parametrize("number", [0, 2])
def test_a_group_of_all_rows_has_the_bits_of_one_adapter(
    number: int, dtype: torch.dtype, native: bool
) -> None:
    extension.load().use_native(native)
    index = torch.full((400,), number)
    given = leaves_of(_tensors(index, 3, 90, 20, dtype))
    dy = torch.randn(400, 90).to(dtype)
    found = run(given, index, dy, "cpp", 0.3)
    alone = {"x": given["x"]} | {name: given[name][number] for name in NAMES}
    y = adapter(
        **alone, activation="gelu", scale=1.5, dropout_p=0.3, seed=SEED, backend="cpp"
    )  # fmt: skip
    assert torch.equal(y, found["y"])
    for name, gradient in zip(alone, torch.autograd.grad(y, list(alone.values()), dy), strict=True):
        assert torch.equal(gradient, found[name] if name == "x" else found[name][number])


@PATHS
@DTYPES
def test_the_mask_goes_by_the_number_of_the_row(dtype: torch.dtype, native: bool) -> None:
    extension.load().use_native(native)
    index = _counts(30, 50, 1, 70)
    tensors = _tensors(index, 3, 150, 4, dtype)
    y = adapter_grouped(
        tensors["x"], tensors["down_weight"], tensors["up_weight"], index, activation="sigmoid",
        residual=None, dropout_p=0.4, seed=SEED, backend="cpp",
    )  # fmt: skip
    keep = rng.dropout_mask(SEED, len(index), 150, 0.4)
    assert torch.equal(y != 0, keep & (index >= 0)[:, None])


@DTYPES
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    index = _counts(60, 500, 3, 200, 0, *[1] * 20)
    tensors, dy = _tensors(index, 24, 70, 12, dtype), torch.randn(len(index), 70)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1, 3):
            torch.set_num_threads(threads)
            found.append(run(leaves_of(tensors), index, dy, "cpp", 0.2))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


@PATHS
@DTYPES
@pytest.mark.parametrize("residual", ["x", "own", None])
def test_rows_of_no_adapter_at_all_are_the_residual(
    residual: str | None, dtype: torch.dtype, native: bool
) -> None:
    """Numbers that no adapter has reach the launcher where nothing checks them: under compile."""
    extension.load().use_native(native)
    index = torch.tensor([0, 2, -1, 2**40, -(2**40), 1])
    t = _tensors(index, 2, 40, 5, dtype)
    x, own = t["x"], torch.randn(6, 40).to(dtype)
    added = {"x": x, "own": own, None: None}[residual]
    y, dx = (torch.full_like(x, float("nan")) for _ in range(2))
    pre = torch.full((6, 5), float("nan"), dtype=dtype)
    parameters = (t["down_weight"], t["up_weight"], t["down_bias"], t["up_bias"])
    call = (1.5, "sigmoid", None, 0.0)
    cpp.forward(x, *parameters, added, *call, y, pre, index)
    none = (index < 0) | (index > 1)
    assert torch.equal(y[none], torch.zeros_like(x)[none] if added is None else added[none])
    assert y.isfinite().all()
    dy = torch.randn(6, 40).to(dtype)
    gradients = [torch.full_like(value, float("nan")) for value in parameters]
    is_input = residual == "x"
    cpp.backward(dy, x, pre, *parameters, *call, is_input, dx, *gradients, None, index)
    assert torch.equal(dx[none], dy[none] if is_input else torch.zeros_like(dy)[none])
    assert all(value.isfinite().all() for value in (dx, *gradients))


@DTYPES
def test_strides_change_no_value_and_inputs_are_not_written(dtype: torch.dtype) -> None:
    index = _counts(4, 30, 0, 40)
    tensors, dy = _tensors(index, 3, 70, 6, dtype), torch.randn(len(index), 70)
    expected = run(leaves_of(tensors), index, dy, "cpp", 0.1)
    nan = torch.full_like(tensors["x"], float("nan"))
    sliced = torch.cat([nan, tensors["x"], nan], 1)[:, 70:140]
    before = {name: value.clone() for name, value in tensors.items()}
    found = run(leaves_of(tensors | {"x": sliced}), index, dy, "cpp", 0.1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    assert torch.equal(sliced, before["x"])
