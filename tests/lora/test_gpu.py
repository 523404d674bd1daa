"""Triton kernels on an NVIDIA GPU: numerics, launches, graphs, streams, 64-bit sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_kernels import LoRALinear, explain, lora_linear
from peft_kernels.core import lora_tiles, rng
from tests.lora.problems import Problem, check, fused, problem, results
from tests.numerics import assert_as_accurate_as_eager

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
SHAPES = [
    pytest.param(512, 1024, 768, 16, id="large"),
    pytest.param(1000, 520, 776, 64, id="large-rank64"),
    pytest.param(300, 515, 777, 5, id="ragged"),
    pytest.param(257, 384, 256, 130, id="rank130"),
    pytest.param(70, 96, 128, 512, id="rank512"),
    pytest.param(128, 256, 256, 8, id="small"),
    pytest.param(16, 1024, 512, 16, id="decode16"),
    pytest.param(1, 777, 1030, 4, id="decode1"),
    pytest.param(1, 1, 1, 1, id="one-of-everything"),
]


def on_gpu(given: Problem) -> Problem:
    moved = {name: getattr(given, name) for name in ("x", "weight", "lora_a", "lora_b", "dy")}
    moved |= {"seed": given.seed, "bias": given.bias}
    return replace(given, **{k: None if t is None else t.cuda() for k, t in moved.items()})


def gpu_problem(*args: int, **kwargs: object) -> Problem:
    return on_gpu(problem(*args, **kwargs))  # type: ignore[arg-type]


def run(given: Problem, backend: str | None = "triton") -> dict[str, Tensor]:
    inputs = given.inputs()
    return results(fused(given, inputs, backend), inputs, given.dy)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=lora_tiles.VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with lora_tiles.forced_variant(request.param):
        yield request.param


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), SHAPES)
def test_every_variant_is_as_accurate_as_eager(
    variant: str,
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dropout_p: float,
    dtype: torch.dtype,
) -> None:
    given = gpu_problem(tokens, out_features, in_features, rank, dtype=dtype, dropout_p=dropout_p)
    check(given, "triton", dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), SHAPES[:4])
def test_tf32_follows_pytorchs_setting(
    tf32: None, tokens: int, out_features: int, in_features: int, rank: int, dropout_p: float
) -> None:
    given = gpu_problem(tokens, out_features, in_features, rank, dropout_p=dropout_p)
    assert explain(lora_linear, given.x, given.weight, given.lora_a, given.lora_b).plan is not None
    # tf32 keeps ten bits of each operand, as float16 does.
    check(given, "triton", torch.float32)


def test_triton_is_what_runs_by_default() -> None:
    given = gpu_problem(64, 64, 64, 8, dtype=torch.bfloat16)
    found = explain(lora_linear, given.x, given.weight, given.lora_a, given.lora_b)
    assert found.backend == "triton" and found.plan


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("size", [19, 256])
def test_mask_equals_the_specification_bit_for_bit(variant: str, size: int, p: float) -> None:
    """A = identity and scale = 1 - p make s the dropped x itself."""
    tokens = 300
    x = torch.randn(tokens, size).abs() + 1
    eye, zeros = torch.eye(size), torch.zeros(size, size)
    seed = torch.tensor([-(2**61) + 12345])
    given = problem(tokens, size, size, size, dropout_p=p, bias=False)
    given = on_gpu(
        replace(given, x=x, weight=zeros, lora_a=eye, lora_b=eye, scale=1.0 - p, seed=seed)
    )
    expected = rng.dropout_mask(seed, tokens, size, p).cuda()
    assert torch.equal(rng.dropout_mask(seed.cuda(), tokens, size, p), expected)
    assert torch.equal(fused(given, given.inputs(), "triton") != 0, expected)
    inputs = given.inputs()
    dy = torch.randn(tokens, size).cuda().abs() + 1
    (dx,) = torch.autograd.grad(fused(given, inputs, "triton"), [inputs[0]], dy)
    assert torch.equal(dx != 0, expected)


@DTYPES
def test_every_output_element_is_written(
    variant: str, dtype: torch.dtype, poisoned_allocations: None
) -> None:
    check(gpu_problem(300, 515, 777, 33, dtype=dtype, dropout_p=0.3), "triton", dtype)


def test_runs_repeat_bit_for_bit(variant: str) -> None:
    given = gpu_problem(2048, 1024, 512, 16, dtype=torch.bfloat16, dropout_p=0.1)
    first = run(given)
    for _ in range(10):
        assert same(run(given), first)


@pytest.mark.parametrize("layout", ["row slices", "expanded rows", "column-major weight"])
def test_strides(variant: str, layout: str) -> None:
    given = gpu_problem(300, 264, 256, 16, dtype=torch.bfloat16, dropout_p=0.1)
    x, weight, dy = given.x, given.weight, given.dy
    if layout == "row slices":
        x = torch.cat([torch.full_like(x, float("nan")), x], 1)[:, 256:]
        dy = torch.cat([dy, torch.full_like(dy, float("nan"))], 1)[:, :264]
    elif layout == "expanded rows":
        x, dy = x[:1].expand(300, 256), dy[:1].expand(300, 264)
    else:
        weight = weight.t().contiguous().t()
    check(replace(given, x=x, weight=weight, dy=dy), "triton", torch.bfloat16)


def kernels_launched(call: Callable[[], object]) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profiler.events() if event.device_type == on_device]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_one_launch_forward_and_two_backward(dropout_p: float) -> None:
    given = gpu_problem(1024, 1024, 512, 16, dtype=torch.bfloat16, dropout_p=dropout_p)
    inputs = given.inputs()
    inputs[1].requires_grad_(False)
    kept: list[Tensor] = []
    with lora_tiles.forced_variant("ticket"):
        fused(given, inputs, "triton").backward(given.dy)  # compiles, and makes the workspace
        for tensor in inputs:
            tensor.grad = None
        forward = kernels_launched(lambda: kept.append(fused(given, inputs, "triton")))
        assert len(forward) == 1, forward
        backward = kernels_launched(lambda: kept[0].backward(given.dy))
        assert len(backward) == 2, backward


def test_cuda_graph_replays_with_new_inputs(variant: str) -> None:
    first = gpu_problem(512, 256, 384, 16, dtype=torch.bfloat16, dropout_p=0.1, seed=1)
    static = gpu_problem(512, 256, 384, 16, dtype=torch.bfloat16, dropout_p=0.1, seed=2)
    inputs = static.inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results(fused(static, inputs, "triton"), inputs, static.dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(fused(static, inputs, "triton"), inputs, static.dy)
    for given in (static, first, first):
        with torch.no_grad():
            for name in ("x", "weight", "lora_a", "lora_b", "dy", "seed"):
                getattr(static, name).copy_(getattr(given, name).clone())
            static.bias.copy_(given.bias.clone())  # type: ignore[union-attr]
        graph.replay()
        torch.cuda.synchronize()
        assert same(found, run(static))


def test_cuda_graph_draws_a_new_mask_at_each_replay() -> None:
    layer = LoRALinear(256, 256, r=16, lora_alpha=16, lora_dropout=0.5, device="cuda")
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 256, device="cuda")
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(y.clone())
    assert not torch.equal(replays[0], replays[1]) and not torch.equal(replays[1], replays[2])


def test_two_streams_do_not_share_their_counters() -> None:
    problems = [
        gpu_problem(2048, 1024, 512, rank, dtype=torch.bfloat16, dropout_p=0.1, seed=rank)
        for rank in (16, 64)
    ]
    streams = [torch.cuda.Stream() for _ in problems]
    with lora_tiles.forced_variant("ticket"):
        expected = [run(given) for given in problems]
        torch.cuda.synchronize()
        for _ in range(20):
            found = []
            for given, stream in zip(problems, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(run(given))
            torch.cuda.synchronize()
            assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("shape", [(4096, 4096, 4096), (2000, 1040, 3584)], ids=str)
def test_hundreds_of_large_launches_give_the_same_bits(
    variant: str, shape: tuple[int, int, int], rank: int, dropout_p: float
) -> None:
    tokens, out_features, in_features = shape
    given = gpu_problem(
        tokens, out_features, in_features, rank, dtype=torch.bfloat16, dropout_p=dropout_p,
        bias=False,
    )  # fmt: skip
    x, weight, lora_a, lora_b = given.inputs()
    weight.requires_grad_(False)
    inputs = [x, weight, lora_a, lora_b]
    first_y, first_dx = None, None
    different = torch.zeros(2, dtype=torch.int64, device="cuda")
    for _ in range(150):
        y = fused(given, inputs, "triton")
        (dx,) = torch.autograd.grad(y, [x], given.dy)
        if first_y is None or first_dx is None:
            first_y, first_dx = y.detach(), dx
            assert y.isfinite().all() and dx.isfinite().all()
        different += torch.stack([(y != first_y).sum(), (dx != first_dx).sum()])
    assert different.tolist() == [0, 0]


def test_results_beyond_two_to_the_31_elements() -> None:
    tokens, out_features = 36000, 60000
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    given = gpu_problem(8, out_features, 64, 16, dtype=torch.bfloat16)
    x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    arguments = (given.weight, given.lora_a, given.lora_b, given.bias)
    y = lora_linear(x, *arguments, scale=1.5, backend="triton")
    assert y.numel() > 2**31
    for rows in (slice(0, 64), slice(-64, None)):
        eager, exact = (
            lora_linear(x[rows].to(dtype), *(t.to(dtype) for t in arguments), scale=1.5,
                        backend="reference")
            for dtype in (torch.bfloat16, torch.float64)
        )  # fmt: skip
        assert_as_accurate_as_eager("y", y[rows], [eager], exact, torch.bfloat16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_inductor_fullgraph(dropout_p: float) -> None:
    given = gpu_problem(256, 128, 64, 16, dtype=torch.bfloat16, dropout_p=dropout_p)

    def call(*inputs: Tensor) -> Tensor:
        return fused(given, list(inputs), "triton")

    inputs = given.inputs()
    compiled = torch.compile(call, fullgraph=True)
    assert same(results(compiled(*inputs), inputs, given.dy), run(given))


def test_float32_adapters_beside_bfloat16_under_autocast_and_not() -> None:
    given = gpu_problem(
        300, 256, 128, 16, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.1
    )
    plain = run(given)
    with torch.autocast("cuda", torch.bfloat16):
        inputs = given.inputs()
        y = fused(given, inputs, "triton")
    under_autocast = results(y, inputs, given.dy)
    assert plain["da"].dtype == torch.float32 and plain["y"].dtype == torch.bfloat16
    assert same(under_autocast, plain)
