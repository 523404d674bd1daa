"""The CUDA library on an NVIDIA GPU: what no emulation shows, streams, devices and real errors."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import PromptOutput, adapter_grouped, explain, lora_linear
from peft_kernels.core import cuda_library
from tests.adapter import problems as adapters
from tests.adapter import test_gpu as adapter
from tests.lora import test_gpu as lora
from tests.lora.problems import judge
from tests.prefix import problems as attention
from tests.prefix import test_gpu as prefix
from tests.prefix.conftest import poisoned_allocations
from tests.prompt import test_gpu as prompt
from tests.prompt.problems import assert_same, fused, gradients, problem

__all__ = ["poisoned_allocations"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        cuda_library.build_info() is None, reason="the CUDA library is not built: not run"
    ),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def test_a_library_that_is_built_serves_this_gpu() -> None:
    assert cuda_library.why_not(torch.device("cuda", 0), torch.bfloat16) is None
    given = lora.gpu_problem(16, 32, 64, 8, dtype=torch.bfloat16)
    arguments = given.x, given.weight, given.lora_a, given.lora_b
    assert explain(lora_linear, *arguments, backend="cuda").backend == "cuda"


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), lora.SHAPES)
def test_lora_is_as_accurate_as_eager_and_repeats_bit_for_bit(
    dtype: torch.dtype,
    dropout_p: float,
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
) -> None:
    given = lora.gpu_problem(
        tokens, out_features, in_features, rank, dtype=dtype, dropout_p=dropout_p
    )
    found = lora.run(given, "cuda")
    judge(given, found, dtype)
    assert lora.same(lora.run(given, "cuda"), found)


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "features", "bottleneck"), adapter.SHAPES)
def test_adapter_is_as_accurate_as_eager_and_repeats_bit_for_bit(
    dtype: torch.dtype, dropout_p: float, tokens: int, features: int, bottleneck: int
) -> None:
    given = adapter.on_gpu(
        adapters.problem(tokens, features, bottleneck, dtype=dtype, dropout_p=dropout_p)
    )
    adapters.check(given, "cuda", dtype)
    found = adapter.run(given, "cuda")
    again = adapter.run(given, "cuda")
    assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize("residual", adapters.RESIDUALS)
@pytest.mark.parametrize("scale", adapters.SCALES)
def test_adapter_in_every_form_of_scale_and_residual(scale: str, residual: str | None) -> None:
    given = adapters.problem(
        700, 520, 21, dtype=torch.bfloat16, dropout_p=0.2, scale=scale, residual=residual
    )
    adapters.check(adapter.on_gpu(given), "cuda", torch.bfloat16)


@pytest.mark.parametrize("activation", adapter.NAMES)
def test_adapter_with_every_activation(activation: str) -> None:
    given = adapters.problem(700, 520, 64, dtype=torch.bfloat16, activation=activation)
    adapters.check(adapter.on_gpu(given), "cuda", torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("groups", [3, 64])
def test_grouped_adapters_are_the_loop(groups: int, dtype: torch.dtype) -> None:
    x = torch.randn(5000, 512, device="cuda", dtype=dtype)
    index = torch.randint(-1, groups, (5000,), device="cuda")
    down = torch.randn(groups, 32, 512, device="cuda", dtype=dtype) / 20
    up = torch.randn(groups, 512, 32, device="cuda", dtype=dtype) / 6
    found = {}
    for backend in ("cuda", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, down, up)]
        y = adapter_grouped(*leaves, index, activation="gelu", backend=backend)
        found[backend] = (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for one, other in zip(found["cuda"], found["reference"], strict=True):
        close = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(one, other, rtol=close, atol=close * other.abs().max().item())


@DTYPES
@pytest.mark.parametrize("position", ["start", "after_padding", 3])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize(
    ("batch", "tokens", "length", "width"), [(3, 7, 4, 16), (35, 300, 20, 777), (4, 2100, 33, 2048)]
)
def test_prompt_gives_the_bits_of_the_cpu(
    dtype: torch.dtype, position: str | int, per_sample: bool,
    batch: int, tokens: int, length: int, width: int,
) -> None:  # fmt: skip
    given = problem(
        batch, tokens, length, width, vocabulary=500, dtype=dtype, prompt_dtype=torch.float32,
        per_sample=per_sample, position=position, padding_idx=4,
    )  # fmt: skip
    moved, leaves = prompt.on_gpu(given), given.leaves()
    there = moved.leaves()
    expected, found = fused(given, leaves, None), fused(moved, there, "cuda")
    for name in PromptOutput._fields:
        assert_same(getattr(found, name).cpu(), getattr(expected, name), name)
    wanted, got = gradients(given, expected, leaves), gradients(moved, found, there)
    for name in wanted:
        assert_same(got[name].cpu(), wanted[name], name)


@DTYPES
@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("layout", prefix.LAYOUTS)
def test_prefix_is_as_accurate_as_eager(
    layout: str, size: int, dtype: torch.dtype, poisoned_allocations: None
) -> None:
    # One query: few numbers decide, so that several problems are judged as one.
    seeds = range(16 if layout == "decoding" else 1)
    sizes = prefix.LAYOUTS[layout] | {"size": size, "dtype": dtype}
    cases = [prefix.on_gpu(attention.problem(**sizes, seed=seed)) for seed in seeds]
    attention.check_together(cases, "cuda", dtype)


@DTYPES
@pytest.mark.parametrize("size", [1, 16, 20, 40, 96, 128, 192, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_prefix_serves_every_head_size(
    dropout_p: float, size: int, dtype: torch.dtype, poisoned_allocations: None
) -> None:
    cases = [
        attention.problem(
            queries=130, keys=150, prefix=70, size=size, causal=True, dtype=dtype,
            dropout_p=dropout_p, seed=seed,
        )
        for seed in range(max(1, 16 // size))
    ]  # fmt: skip
    attention.check_together([prefix.on_gpu(each) for each in cases], "cuda", dtype)


@DTYPES
@pytest.mark.parametrize("size", [64, 100, 256])
def test_a_gate_of_zero_is_bit_for_bit_no_prefix(size: int, dtype: torch.dtype) -> None:
    prefix.assert_a_gate_of_zero_is_no_prefix(size, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("gate", [1e-5, 0.3, 3.0])
def test_a_gate_of_any_size(gate: float, dtype: torch.dtype) -> None:
    cases = [
        attention.problem(
            queries=70, keys=100, prefix=40, padding="all", gated=True, dtype=dtype, seed=seed
        )
        for seed in range(4)
    ]
    for given in cases:
        given.tensors["gate"] = torch.tensor([gate, -gate, gate, 2 * gate])
    found = attention.check_together([prefix.on_gpu(given) for given in cases], "cuda", dtype)
    assert found["d gate"].abs().min() > 0


@DTYPES
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_prefix_repeats_bit_for_bit(gated: bool, dtype: torch.dtype) -> None:
    prefix.assert_runs_repeat(gated, dtype, "cuda")


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_prefix_drops_what_triton_drops(gated: bool) -> None:
    """Values that are unit vectors show which probabilities are left."""
    given = attention.problem(
        queries=150, keys=60, prefix=68, size=128, gated=gated, dtype=torch.bfloat16, dropout_p=0.3
    )
    units = torch.eye(128, dtype=torch.bfloat16)
    given.tensors["prefix_value"] = units[:68].expand(2, -1, -1)
    given.tensors["value"] = units[68:].expand(2, 2, -1, -1)
    moved = prefix.on_gpu(given)
    out, _ = attention.fused(moved, moved.inputs(), "cuda")
    other, _ = attention.fused(moved, moved.inputs(), "triton")
    expected = attention.keep_masks(given)
    assert expected is not None
    assert torch.equal((out != 0).cpu(), torch.cat(expected, -1))
    assert torch.equal(out != 0, other != 0)


def test_a_captured_prefix_graph_replays() -> None:
    prefix.assert_a_captured_graph_replays("cuda")


def test_nothing_of_the_size_of_a_prefix_for_each_row_is_allocated() -> None:
    prefix.assert_no_prefix_for_each_row_is_allocated("cuda")


def test_queries_beyond_two_to_the_31_elements() -> None:
    prefix.assert_queries_beyond_two_to_the_31_elements("cuda")


def test_it_runs_on_the_current_stream_and_in_a_graph() -> None:
    given = prompt.on_gpu(problem(5, 9, 4, 64, position="after_padding"))
    leaves = given.leaves()
    fused(given, leaves, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(given, leaves, "cuda")
    given.input_ids.copy_((given.input_ids + 1) % 11)
    graph.replay()
    assert torch.equal(captured.embeddings, fused(given, leaves, "cuda").embeddings)


def test_a_failed_launch_names_the_kernel_and_the_process_goes_on() -> None:
    dy = torch.randn(2, 5, 8, device="cuda")
    with pytest.raises(RuntimeError, match=r"^prompt_gradient: invalid (configuration )?argument$"):
        cuda_library.call("prompt_gradient", dy, None, 0, dy.new_empty(0, 8))
    found = dy.new_empty(2, 8)
    cuda_library.call("prompt_gradient", dy, None, 0, found)
    torch.cuda.synchronize()
    assert torch.equal(found, dy[0, :2] + dy[1, :2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_device_of_its_tensors() -> None:
    dy = torch.randn(2, 5, 8, device="cuda:1")
    found = dy.new_empty(2, 8)
    with torch.cuda.device(0):
        cuda_library.call("prompt_gradient", dy, None, 0, found)
        assert torch.cuda.current_device() == 0
    assert torch.equal(found, dy[0, :2] + dy[1, :2])
