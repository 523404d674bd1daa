"""Many adapters in one call: equal to the loop over them, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import BackendUnavailable, adapter, adapter_grouped, explain
from peft_kernels.core import rng, triton_runtime
from tests.adapter.problems import ACTIVATIONS
from tests.numerics import assert_as_accurate_as_eager

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
)
BACKENDS = ["reference", "cpp", TRITON]
ADAPTERS, ROWS, FEATURES, BOTTLENECK = 4, 90, 40, 5
SEED = torch.tensor([12345])
NAMES = ("down_weight", "up_weight", "down_bias", "up_bias")


def _tensors(
    dtype: torch.dtype = torch.float32,
    rows: int = ROWS,
    bottleneck: int = BOTTLENECK,
    parameter_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    small = parameter_dtype or dtype
    return {
        "x": torch.randn(rows, FEATURES).to(dtype),
        "down_weight": (torch.randn(ADAPTERS, bottleneck, FEATURES) / 6).to(small),
        "up_weight": (torch.randn(ADAPTERS, FEATURES, bottleneck) / 2).to(small),
        "down_bias": torch.randn(ADAPTERS, bottleneck).to(small),
        "up_bias": torch.randn(ADAPTERS, FEATURES).to(small),
    }


def _index(rows: int = ROWS, unused: int | None = 2) -> Tensor:
    """Return an index of every row, one adapter without any."""
    index = torch.randint(-1, ADAPTERS, (rows,))
    return index if unused is None else index.masked_fill(index == unused, -1)


def leaves_of(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {
        name: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
        for name, t in tensors.items()
    }


def _loop(
    given: dict[str, Tensor], index: Tensor, p: float, activation: str, scale: float
) -> Tensor:
    """Return y by eager PyTorch, one adapter after the other."""
    x = given["x"]
    keep = rng.dropout_mask(SEED, *x.shape, p) if p else torch.ones(x.shape, dtype=torch.bool)
    y = x.clone()
    for number in range(len(given["down_weight"])):
        rows = (index == number).nonzero().flatten()
        down, up, down_bias, up_bias = (given[name][number] for name in NAMES)
        hidden = ACTIVATIONS[activation](x[rows] @ down.t() + down_bias)
        branch = (hidden @ up.t() + up_bias) * keep[rows] / (1.0 - p)
        y = y.index_add(0, rows, (branch * scale).to(y.dtype))
    return y


def run(
    given: dict[str, Tensor], index: Tensor, dy: Tensor, backend: str | None, p: float = 0.0,
    activation: str = "gelu", scale: float = 1.5,
) -> dict[str, Tensor]:  # fmt: skip
    y = adapter_grouped(
        **given, index=index, activation=activation, scale=scale, dropout_p=p,
        seed=SEED if p else None, backend=backend,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(given.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(given, gradients, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_gradient_passes_gradcheck_in_float64(p: float) -> None:
    tensors, index = _tensors(torch.float64, rows=7, bottleneck=2), _index(7)
    assert torch.autograd.gradcheck(
        lambda x, *parameters: adapter_grouped(
            x, **dict(zip(NAMES, parameters, strict=True)), index=index, activation="gelu",
            dropout_p=p, seed=SEED if p else None, backend="reference",
        ),
        list(leaves_of(tensors).values()),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", TRITON])  # cpp: test_cpp_grouped.py
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_as_accurate_as_the_eager_loop(backend: str, p: float, dtype: torch.dtype) -> None:
    check_grouped(_tensors(dtype), _index(), torch.randn(ROWS, FEATURES), backend, p)


def check_grouped(
    tensors: dict[str, Tensor], index: Tensor, dy: Tensor, backend: str, p: float
) -> dict[str, Tensor]:
    """Hold y and every gradient to the 1.5x rule against the eager loop; return them."""
    dtype = tensors["x"].dtype
    found = run(leaves_of(tensors), index, dy, backend, p)

    def loop(kind: torch.dtype) -> dict[str, Tensor]:
        leaves = leaves_of(tensors, kind)
        y = _loop(leaves, index, p, "gelu", 1.5)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype).to(kind))
        return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))

    exact, eager = loop(torch.float64), loop(dtype)
    for name, value in found.items():
        assert_as_accurate_as_eager(name, value, [eager[name]], exact[name], dtype)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_is_what_its_adapter_alone_gives(backend: str) -> None:
    tensors, index = _tensors(), _index(unused=None)
    y = adapter_grouped(**tensors, index=index, activation="silu", backend=backend)
    for number in range(-1, ADAPTERS):
        rows = index == number
        assert rows.any()
        expected = tensors["x"][rows]
        if number >= 0:
            parameters = (tensors[name][number] for name in NAMES)
            expected = adapter(expected, *parameters, activation="silu", backend=backend)
        torch.testing.assert_close(y[rows], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ["input", "own", None])
def test_rows_without_an_adapter_are_the_residual(backend: str, residual: str | None) -> None:
    tensors, index = leaves_of(_tensors()), torch.full((ROWS,), -1)
    own = torch.randn(ROWS, FEATURES)
    added: Any = own if residual == "own" else residual
    # Half of a sigmoid of nothing must not leak in, nor a bias.
    y = adapter_grouped(
        **tensors, index=index, activation="sigmoid", residual=added, backend=backend
    )
    expected = {"input": tensors["x"].detach(), "own": own, None: torch.zeros_like(own)}[residual]
    assert torch.equal(y.detach(), expected)
    dy = torch.randn_like(y)
    dx, *gradients = torch.autograd.grad(y, list(tensors.values()), dy)
    assert torch.equal(dx, dy if residual == "input" else torch.zeros_like(dy))
    assert all((gradient == 0).all() for gradient in gradients)


# NumPy, which interprets Triton's kernels, warns of infinity times zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinity_in_a_row_without_an_adapter_stays_where_it_is(backend: str) -> None:
    tensors, index = _tensors(), torch.full((ROWS,), -1)
    tensors["x"][3, 7] = float("inf")
    leaves = leaves_of(tensors)
    y = adapter_grouped(**leaves, index=index, backend=backend)
    assert torch.equal(y.detach(), tensors["x"])
    dy = torch.randn_like(y)
    dy[5, 2] = float("-inf")
    assert torch.equal(torch.autograd.grad(y, leaves["x"], dy)[0], dy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_by_sample_is_one_by_row_repeated(backend: str) -> None:
    tensors = _tensors(rows=30)
    tensors["x"] = tensors["x"].view(5, 6, FEATURES)
    by_sample = torch.tensor([3, -1, 0, 3, 1])
    found = adapter_grouped(**tensors, index=by_sample, backend=backend)
    by_row = by_sample[:, None].expand(5, 6)
    assert torch.equal(found, adapter_grouped(**tensors, index=by_row, backend=backend))
    flat = by_row.reshape(-1)
    assert torch.equal(found, adapter_grouped(**tensors, index=flat, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    tensors, index = leaves_of(_tensors(rows=0)), torch.zeros(0, dtype=torch.int64)
    found = run(tensors, index, torch.zeros(0, FEATURES), backend)
    assert found["y"].shape == (0, FEATURES)
    assert all((found[name] == 0).all() for name in NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_element_is_written(backend: str, poisoned_allocations: None) -> None:
    found = run(leaves_of(_tensors()), _index(), torch.randn(ROWS, FEATURES), backend, 0.2)
    assert all(value.isfinite().all() for value in found.values())
    assert all((found[name][2] == 0).all() for name in NAMES)
    assert all((found[name][1] != 0).any() for name in NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_repeat_bit_for_bit(backend: str) -> None:
    tensors, index, dy = _tensors(), _index(), torch.randn(ROWS, FEATURES)
    first, second = (run(leaves_of(tensors), index, dy, backend, 0.2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@TRITON.marks[0]
@pytest.mark.parametrize("bottleneck", [BOTTLENECK, 40])
def test_one_launch_forward_and_two_backward(launches: list[str], bottleneck: int) -> None:
    tensors, index = leaves_of(_tensors(bottleneck=bottleneck)), _index()
    y = adapter_grouped(**tensors, index=index, backend="triton")
    assert launches == ["_adapter_forward_kernel"]
    y.sum().backward()
    assert launches[1:] == ["_adapter_backward_kernel", "_token_reduction_kernel"]


@TRITON.marks[0]
def test_bottlenecks_above_256_run_as_a_loop() -> None:
    tensors, index, dy = _tensors(rows=9, bottleneck=257), _index(9), torch.randn(9, FEATURES)
    found, expected = (
        run(leaves_of(tensors), index, dy, backend, 0.2) for backend in ("triton", "reference")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_float32_parameters_beside_bfloat16_get_float32_gradients() -> None:
    tensors = _tensors(torch.bfloat16, parameter_dtype=torch.float32)
    found = run(leaves_of(tensors), _index(), torch.randn(ROWS, FEATURES), None)
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    assert all(found[name].dtype == torch.float32 for name in NAMES)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fullgraph_gives_what_eager_gives(p: float) -> None:
    tensors, index, dy = _tensors(), _index(), torch.randn(ROWS, FEATURES)
    compiled = torch.compile(
        lambda given: adapter_grouped(
            **given, index=index, activation="gelu", scale=1.5, dropout_p=p,
            seed=SEED if p else None,
        ),
        fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    leaves = leaves_of(tensors)
    y = compiled(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    expected = run(leaves_of(tensors), index, dy, None, p)
    for value, name in zip((y.detach(), *gradients), expected, strict=True):
        torch.testing.assert_close(value, expected[name])


def test_an_index_out_of_range_is_refused_under_compile_too() -> None:
    tensors = _tensors(rows=4)
    compiled = torch.compile(
        lambda index: adapter_grouped(**tensors, index=index), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.tensor([0, -1, 3, 0])).shape == (4, FEATURES)
    with pytest.raises(ValueError, match="from -1 .* to 3 for 4 adapters, got 4"):
        compiled(torch.tensor([0, -1, 4, 0]))


def test_explain_names_the_op_and_its_reasons() -> None:
    said = explain(adapter_grouped, **_tensors(), index=_index())
    assert said.op == "adapter_grouped" and said.backend == "cpp"
    said = explain(adapter_grouped, **_tensors(torch.float64), index=_index())
    assert said.backend == "reference" and "float32 and bfloat16" in said.reasons["cpp"]


BAD = [
    ({"index": [0, 1]}, TypeError, "index must be an int64 tensor"),
    ({"index": torch.zeros(4)}, TypeError, r"index must be an int64 .*index.long\(\)"),
    ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \[4\].*got \[3\]"),
    ({"index": torch.tensor([0, 1, 2, 4])}, ValueError, "from -1 .* to 3 for 4 adapters, got 4"),
    ({"index": torch.tensor([0, -2, 2, 3])}, ValueError, "from -1 .* to 3 .* got -2"),
    ({"down_weight": torch.randn(5, 40)}, ValueError, r"down_weight .* \[E, r, D\]"),
    ({"up_weight": torch.randn(3, 40, 5)}, ValueError, r"up_weight .*\[4, 40, 5\].*\[3, 40, 5\]"),
    ({"down_bias": torch.randn(5)}, ValueError, r"down_bias must have shape \[4, 5\]"),
    ({"scale": torch.ones(4)}, TypeError, "one number for all adapters"),
    ({"activation": "swish"}, ValueError, "activation must be one of relu"),
    ({"backend": "cuda"}, BackendUnavailable, "cuda: serves NVIDIA GPUs"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments: dict[str, Any] = _tensors(rows=4) | {"index": torch.tensor([0, -1, 3, 0])}
    with pytest.raises(error, match=match):
        adapter_grouped(**(arguments | change))
