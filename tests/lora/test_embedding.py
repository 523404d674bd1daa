"""``lora_embedding``: values, gradients, padding, dtypes, and what its user may get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from peft_kernels import lora_embedding
from tests.numerics import assert_as_accurate_as_eager

ROWS, WIDTH, RANK = 23, 18, 5
NAMES = ("y", "dweight", "da", "db")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _problem(
    dtype: torch.dtype = torch.float32,
    small: torch.dtype | None = None,
    shape: tuple[int, ...] = (3, 7),
    rank: int = RANK,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return ids with repetitions, leaves (table, A, B) and dy."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(kind)

    ids = torch.randint(0, ROWS, shape, generator=generator)
    small = small or dtype
    leaves = [normal(ROWS, WIDTH), normal(rank, ROWS, kind=small), normal(WIDTH, rank, kind=small)]
    return ids, [leaf.requires_grad_() for leaf in leaves], normal(*shape, WIDTH)


def _peft_form(
    ids: Tensor, leaves: list[Tensor], scale: float, padding_idx: int | None = None
) -> Tensor:
    """Return y as ``Embedding.forward`` of peft writes it."""
    weight, lora_a, lora_b = leaves
    result = F.embedding(ids, weight, padding_idx=padding_idx)
    low = F.embedding(ids, lora_a.T, padding_idx=padding_idx)
    return (result + (low @ lora_b.T) * scale).to(weight.dtype)


def _results(y: Tensor, leaves: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    return dict(zip(NAMES, [y.detach(), *torch.autograd.grad(y, leaves, dy)], strict=True))


def _as(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("padding_idx", [None, 4, -1])
@pytest.mark.parametrize("small", [None, torch.float32], ids=["own", "fp32 adapters"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_peft(
    dtype: torch.dtype, small: torch.dtype | None, padding_idx: int | None
) -> None:
    if dtype == torch.float64 and small is not None:
        small = torch.float64
    ids, leaves, dy = _problem(dtype, small, shape=(9, 7))
    y = lora_embedding(ids, *leaves, scale=1.5, padding_idx=padding_idx)
    found = _results(y, leaves, dy)
    assert [found[name].dtype for name in NAMES[1:]] == [leaf.dtype for leaf in leaves]
    if padding_idx is not None:
        assert (ids == padding_idx % ROWS).any()
        assert not found["dweight"][padding_idx].any() and not found["da"][:, padding_idx].any()
    wide, own = _as(leaves, torch.float64), _as(leaves, dtype)
    exact = _results(_peft_form(ids, wide, 1.5, padding_idx), wide, dy.double())
    eager = _results(_peft_form(ids, own, 1.5, padding_idx), own, dy)
    for name in NAMES:
        if dtype == torch.float64:
            torch.testing.assert_close(found[name], exact[name], rtol=1e-13, atol=1e-13)
            continue
        assert_as_accurate_as_eager(name, found[name], [eager[name]], exact[name], dtype)


def test_gradients_by_differences() -> None:
    ids, leaves, _ = _problem(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: lora_embedding(ids, *t, scale=-0.7), leaves)


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (0,), (2, 0)])
def test_any_shape_of_ids_and_any_rank(shape: tuple[int, ...], rank: int) -> None:
    ids, leaves, dy = _problem(torch.float64, shape=shape, rank=rank)
    found = _results(lora_embedding(ids, *leaves, scale=2.0), leaves, dy)
    expected = _results(_peft_form(ids, leaves, 2.0), leaves, dy)
    assert found["y"].shape == (*shape, WIDTH)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])


def test_int32_ids_and_strided_tensors() -> None:
    ids, leaves, dy = _problem(torch.float64)
    expected = _results(lora_embedding(ids, *leaves, scale=2.0), leaves, dy)
    strided = [leaf.detach().t().contiguous().t().requires_grad_() for leaf in leaves]
    columns = ids.t().contiguous().t().int()
    assert not columns.is_contiguous() and not any(t.is_contiguous() for t in strided)
    found = _results(lora_embedding(columns, *strided, scale=2.0), strided, dy)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])


def test_a_frozen_table_gets_no_gradient_and_nothing_is_written_to() -> None:
    ids, leaves, dy = _problem()
    leaves[0].requires_grad_(False)
    before = [t.detach().clone() for t in (ids, *leaves, dy)]
    lora_embedding(ids, *leaves, scale=2.0).backward(dy)
    assert [leaf.grad is not None for leaf in leaves] == [False, True, True]
    assert all(map(torch.equal, before, (ids, *leaves, dy)))


def test_nothing_of_the_size_of_y_is_saved() -> None:
    ids, leaves, _ = _problem(shape=(40, 50), rank=2)
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        keep_alive = lora_embedding(ids, *leaves, scale=2.0)
    for tensor in (ids, *leaves):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert 0 < sum(storages.values()) <= 2000 * 2 * 4 < keep_alive.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_tables_dtype(dtype: torch.dtype) -> None:
    ids, leaves, dy = _problem(dtype, torch.float32)
    expected = _results(lora_embedding(ids, *leaves, scale=2.0), leaves, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_embedding(ids, *leaves, scale=2.0)
        found = _results(y, leaves, dy)
    assert y.dtype == dtype
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


BAD = [
    ({"input_ids": [1]}, TypeError, "input_ids must be a torch.Tensor"),
    ({"input_ids": torch.ones(3)}, TypeError, "input_ids must be int64 or int32"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \[V, D\]"),
    ({"weight": torch.ones(ROWS, WIDTH, dtype=torch.int8)}, TypeError, "weight must be float64"),
    ({"weight": torch.ones(ROWS, WIDTH).double()}, TypeError, "lora_a is torch.float32 and weight"),
    ({"lora_a": torch.ones(RANK, 7)}, ValueError, r"lora_a must have shape \[r, 23\].*\[5, 7\]"),
    ({"lora_a": torch.ones(0, ROWS)}, ValueError, "rank of at least 1"),
    ({"lora_b": torch.ones(7, RANK)}, ValueError, r"lora_b must have shape \[18, 5\].*\[7, 5\]"),
    ({"lora_b": torch.ones(WIDTH, 4)}, ValueError, r"lora_b must have shape \[18, 5\]"),
    ({"lora_b": torch.ones(WIDTH, RANK, device="meta")}, ValueError, "lora_b is on meta"),
    ({"lora_b": torch.ones(WIDTH, RANK).half()}, TypeError, "lora_b is torch.float16.*cast lora_b"),
    ({"scale": "2"}, TypeError, "scale must be a number"),
    ({"padding_idx": ROWS}, ValueError, r"padding_idx must lie in \[-23, 23\), got 23"),
    ({"padding_idx": 1.0}, TypeError, "padding_idx must be an integer"),
    ({"input_ids": torch.tensor([ROWS])}, IndexError, "index"),
    ({"input_ids": torch.tensor([-1])}, IndexError, "index"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    ids, (weight, lora_a, lora_b), _ = _problem()
    given = {"input_ids": ids, "weight": weight, "lora_a": lora_a, "lora_b": lora_b} | change
    with pytest.raises(error, match=match):
        lora_embedding(**given)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_gives_what_eager_gives(backend: str) -> None:
    torch._dynamo.reset()
    ids, leaves, dy = _problem(torch.float32)
    compiled = torch.compile(
        lambda *t: lora_embedding(ids, *t, scale=1.5, padding_idx=4),
        fullgraph=True,
        backend=backend,
    )
    found = _results(compiled(*leaves), leaves, dy)
    expected = _results(lora_embedding(ids, *leaves, scale=1.5, padding_idx=4), leaves, dy)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.timeout(300)
def test_no_recompilation_from_the_third_distinct_scale_on() -> None:
    torch._dynamo.reset()
    ids, leaves, _ = _problem()
    counter = CompileCounter()
    run = torch.compile(
        lambda scale: lora_embedding(ids, *leaves, scale=scale), fullgraph=True, backend=counter
    )
    frames = []
    for scale in (0.5, 1.5, 2.5, 3.5, 4.5):
        torch.testing.assert_close(run(scale), lora_embedding(ids, *leaves, scale=scale))
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4 and frames[1] <= 2


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_an_id_below_zero_raises_compiled_too(compiler: str) -> None:
    torch._dynamo.reset()
    _, (table, a, b), _ = _problem()
    run = torch.compile(lambda ids: lora_embedding(ids, table, a, b), backend=compiler)
    with pytest.raises((IndexError, RuntimeError), match="out of range|out of bounds"):
        run(torch.tensor([-1]))


def test_shapes_alone_on_the_meta_device() -> None:
    ids, leaves, _ = _problem()
    table, a, b = (leaf.detach().to("meta").requires_grad_() for leaf in leaves)
    y = lora_embedding(ids.to("meta"), table, a, b)
    y.sum().backward()
    assert y.shape == (3, 7, WIDTH) and a.grad is not None and a.grad.shape == a.shape
