"""Several LoRA projections on an NVIDIA GPU: numerics, launches, graphs, streams, remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import explain, lora_projections
from peft_kernels.core import lora_tiles
from tests.lora.groups import call, check, flat, group, inputs_of, results, run, run_separately
from tests.lora.problems import Problem
from tests.lora.test_gpu import kernels_launched, on_gpu, same

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

# Tokens, in features, (out features, rank) of each: query, key and value; gate and up.
SHAPES = [
    pytest.param(512, 768, [(768, 16), (256, 16), (256, 16)], id="qkv"),
    pytest.param(1000, 776, [(520, 64), (1032, 64)], id="gate-up-rank64"),
    pytest.param(300, 777, [(515, 5), (130, 33), (64, 16), (1, 1)], id="ragged"),
    pytest.param(128, 256, [(256, 8), (64, 8), (64, 8)], id="small"),
    pytest.param(16, 512, [(1024, 16), (256, 16)], id="decode16"),
    pytest.param(300, 256, [(256, 16)] * 6, id="six"),
]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
VARIANTS = pytest.mark.parametrize("variant", [None, "ticket"], ids=["chosen", "grouped"])


def gpu_group(*args: Any, **kwargs: Any) -> list[Problem]:
    every = [on_gpu(each) for each in group(*args, **kwargs)]
    return [replace(each, x=every[0].x) for each in every]


@DTYPES
@VARIANTS
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "in_features", "shapes"), SHAPES)
def test_as_accurate_as_eager(
    tokens: int,
    in_features: int,
    shapes: list[tuple[int, int]],
    dropout_p: float,
    variant: str | None,
    dtype: torch.dtype,
) -> None:
    given = gpu_group(tokens, in_features, shapes, dropout_p=dropout_p, dtype=dtype)
    with lora_tiles.forced_variant(variant):
        check(given, "triton", dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_tf32(dropout_p: float) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        given = gpu_group(512, 768, [(768, 16), (256, 40)], dropout_p=dropout_p)
        check(given, "triton", torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@DTYPES
def test_every_output_element_is_written(dtype: torch.dtype, poisoned_allocations: None) -> None:
    given = gpu_group(300, 777, [(515, 33), (130, 5)], dropout_p=0.3, dtype=dtype)
    with lora_tiles.forced_variant("ticket"):
        check(given, "triton", dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_masks_and_values_are_those_of_lora_linear(dropout_p: float) -> None:
    given = gpu_group(
        512, 768, [(768, 16), (256, 16), (256, 8)], dropout_p=dropout_p, dtype=torch.float32
    )
    found, expected = run(given, "triton"), run_separately(given, "triton")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@VARIANTS
def test_runs_repeat_bit_for_bit(variant: str | None) -> None:
    given = gpu_group(
        2048, 1024, [(1024, 16), (256, 16), (256, 16)], dtype=torch.bfloat16, dropout_p=0.1
    )
    with lora_tiles.forced_variant(variant):
        first = run(given)
        for _ in range(20):
            assert same(run(given), first)


def _launched(call_it: Callable[[], object]) -> int:
    return len(kernels_launched(call_it))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_launch_forward_and_one_for_dx(count: int, dropout_p: float) -> None:
    given = gpu_group(1024, 512, [(512, 16)] * count, dtype=torch.bfloat16, dropout_p=dropout_p)
    inputs = inputs_of(given)
    for own in inputs:
        own[1].requires_grad_(False)
    dys = [each.dy for each in given]
    kept: list[tuple[Tensor, ...]] = []
    with lora_tiles.forced_variant("ticket"):
        found = explain(
            lora_projections, inputs[0][0], *([own[kind] for own in inputs] for kind in (1, 2, 3))
        )
        assert found.plan is not None and f"1 launch for {count} projections" in found.plan
        for _ in range(2):  # compiles, and is remembered
            torch.autograd.grad(call(given, inputs), _trained(inputs), dys)
        assert _launched(lambda: kept.append(call(given, inputs))) == 1
        backward = lambda: torch.autograd.grad(kept[0], _trained(inputs), dys)  # noqa: E731
        assert _launched(backward) == 1 + count


def _trained(inputs: list[list[Tensor]]) -> list[Tensor]:
    return [t for t in flat(inputs) if t.requires_grad]


def test_seeds_are_drawn_in_one_launch() -> None:
    given = gpu_group(64, 64, [(64, 8)] * 3, dtype=torch.bfloat16, dropout_p=0.5)
    inputs = inputs_of(given)
    with lora_tiles.forced_variant("ticket"), torch.no_grad():
        call(given, inputs, seeds=None)
        assert _launched(lambda: call(given, inputs, seeds=None)) == 2


def test_a_remembered_call_follows_its_tensors() -> None:
    cases = [
        gpu_group(300, 256, [(256, 16), (64, 8)], dtype=torch.bfloat16, dropout_p=0.1, seed=seed)
        for seed in range(4)
    ]
    with lora_tiles.forced_variant("ticket"):
        for given in cases * 2:
            check(given, "triton", torch.bfloat16)


def test_cuda_graph_replays_with_new_inputs() -> None:
    shapes = [(256, 16), (64, 16), (64, 8)]
    options = {"dtype": torch.bfloat16, "dropout_p": 0.1}
    other = gpu_group(512, 384, shapes, seed=1, **options)
    static = gpu_group(512, 384, shapes, seed=2, **options)
    inputs = inputs_of(static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with lora_tiles.forced_variant("ticket"):
        with torch.cuda.stream(stream):
            for _ in range(3):
                results(static, call(static, inputs), inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = results(static, call(static, inputs), inputs)
        for given in (static, other, other):
            with torch.no_grad():
                for into, source in zip(static, given, strict=True):
                    for name in ("x", "weight", "lora_a", "lora_b", "bias", "dy", "seed"):
                        getattr(into, name).copy_(getattr(source, name).clone())
            graph.replay()
            torch.cuda.synchronize()
            assert same(found, run(static))


def test_two_streams_do_not_share_their_counters() -> None:
    cases = [
        gpu_group(2048, 512, [(1024, rank), (256, rank)], dtype=torch.bfloat16, dropout_p=0.1)
        for rank in (16, 64)
    ]
    streams = [torch.cuda.Stream() for _ in cases]
    with lora_tiles.forced_variant("ticket"):
        expected = [run(given) for given in cases]
        torch.cuda.synchronize()
        for _ in range(20):
            found = []
            for given, stream in zip(cases, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(run(given))
            torch.cuda.synchronize()
            assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_inductor_fullgraph(dropout_p: float) -> None:
    given = gpu_group(256, 64, [(128, 16), (64, 8)], dtype=torch.bfloat16, dropout_p=dropout_p)
    inputs = inputs_of(given)
    compiled = torch.compile(lambda own: call(given, own), fullgraph=True)
    assert same(results(given, compiled(inputs), inputs), run(given))
