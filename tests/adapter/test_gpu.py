"""Triton kernels on an NVIDIA GPU: numerics in bf16, graphs, repeatability, many adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_kernels import adapter_grouped
from peft_kernels.adapter.activations import NAMES
from peft_kernels.core import rng
from tests.adapter.problems import RESIDUALS, SCALES, Problem, check, fused, problem, results

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
SHAPES = [
    pytest.param(5000, 768, 48, id="many-tokens"),
    pytest.param(512, 1024, 64, id="few-tokens"),
    pytest.param(300, 777, 5, id="ragged"),
    pytest.param(5000, 256, 130, id="bottleneck130"),
    pytest.param(4200, 96, 256, id="bottleneck256"),
    pytest.param(70, 96, 300, id="library"),
    pytest.param(1, 1, 1, id="one-of-everything"),
]


def on_gpu(given: Problem) -> Problem:
    tensors = {name: t.cuda() for name, t in given.tensors.items()}
    return replace(given, tensors=tensors, dy=given.dy.cuda(), seed=given.seed.cuda())


def run(given: Problem, backend: str = "triton") -> dict[str, Tensor]:
    inputs = given.inputs()
    return results(fused(given, inputs, backend), inputs, given.dy)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "features", "bottleneck"), SHAPES)
def test_as_accurate_as_eager(
    tokens: int, features: int, bottleneck: int, dropout_p: float, dtype: torch.dtype
) -> None:
    given = problem(tokens, features, bottleneck, dtype=dtype, dropout_p=dropout_p)
    check(on_gpu(given), "triton", dtype)


@pytest.mark.parametrize(("tokens", "features", "bottleneck"), SHAPES)
def test_tf32_products_are_as_accurate_as_eagers(
    tf32: None, tokens: int, features: int, bottleneck: int
) -> None:
    check(on_gpu(problem(tokens, features, bottleneck)), "triton", torch.float32)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_form_of_scale_and_residual(scale: str, residual: str | None) -> None:
    given = problem(
        700, 520, 21, dtype=torch.bfloat16, dropout_p=0.2, scale=scale, residual=residual
    )
    check(on_gpu(given), "triton", torch.bfloat16)


@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation: str) -> None:
    given = problem(700, 520, 64, dtype=torch.bfloat16, activation=activation)
    check(on_gpu(given), "triton", torch.bfloat16)


@pytest.mark.parametrize("scale", SCALES)
def test_runs_repeat_bit_for_bit(scale: str) -> None:
    given = on_gpu(problem(9000, 1024, 100, dtype=torch.bfloat16, dropout_p=0.1, scale=scale))
    first = run(given)
    for _ in range(5):
        again = run(given)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_mask_is_the_specifications() -> None:
    given = on_gpu(problem(333, 129, 7, dropout_p=0.3, residual=None, dtype=torch.bfloat16))
    kept = fused(given, given.inputs(), "triton") != 0
    assert torch.equal(kept, rng.dropout_mask(given.seed, 333, 129, 0.3))


def test_a_captured_graph_replays() -> None:
    given = on_gpu(problem(512, 256, 32, dtype=torch.bfloat16, dropout_p=0.1, scale="learned"))
    expected = run(given)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(given)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("adapters", [3, 64])
def test_many_adapters_are_the_loop_and_nothing_waits_for_the_device(adapters: int) -> None:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    x, index = normal(5000, 512), torch.randint(-1, adapters, (5000,), device="cuda")
    parameters = [normal(adapters, 32, 512) / 20, normal(adapters, 512, 32) / 6]
    found = {}
    for backend in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        with_sync = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if backend == "triton" else with_sync)
        try:
            y = adapter_grouped(*leaves, index, activation="gelu", backend=backend)
            gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        finally:
            torch.cuda.set_sync_debug_mode(with_sync)
        found[backend] = (y, *gradients)
    for one, other in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


def test_results_beyond_two_to_the_31_elements() -> None:
    tokens, features = 270000, 8192
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    given = on_gpu(problem(8, features, 16, dtype=torch.bfloat16))
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    inputs = {name: t.detach() for name, t in given.inputs().items()}
    y = fused(given, inputs | {"x": x}, "triton")
    assert y.numel() > 2**31
    for rows in (slice(0, 64), slice(-64, None)):
        expected = fused(given, inputs | {"x": x[rows]}, "reference")
        torch.testing.assert_close(y[rows], expected, rtol=2e-2, atol=2e-2)
