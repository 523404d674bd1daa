"""Prompt kernels on an NVIDIA GPU: bits, launches, ids outside the table, graphs, 64-bit sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_kernels import PromptOutput, prompt_embedding
from tests.prompt.problems import Problem, assert_same, fused, gradients, problem

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


def on_gpu(given: Problem) -> Problem:
    """Return the problem with its tensors on the GPU."""
    tensors = {name: t.cuda() for name, t in vars(given).items() if isinstance(t, torch.Tensor)}
    return replace(given, **tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("position", ["start", "after_padding", 3])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize(
    ("batch", "tokens", "length", "width"), [(3, 7, 4, 16), (35, 300, 20, 777), (4, 2100, 33, 2048)]
)
def test_triton_gives_the_bits_of_the_cpu(
    dtype: torch.dtype, position: str | int, per_sample: bool,
    batch: int, tokens: int, length: int, width: int,
) -> None:  # fmt: skip
    given = problem(
        batch, tokens, length, width, vocabulary=500, dtype=dtype, prompt_dtype=torch.float32,
        per_sample=per_sample, position=position, padding_idx=4,
    )  # fmt: skip
    moved, leaves = on_gpu(given), given.leaves()
    there = moved.leaves()
    expected, found = fused(given, leaves, None), fused(moved, there, "triton")
    for name in PromptOutput._fields:
        assert_same(getattr(found, name).cpu(), getattr(expected, name), name)
    wanted, got = gradients(given, expected, leaves), gradients(moved, found, there)
    for name in wanted:
        assert_same(got[name].cpu(), wanted[name], name)
    again = gradients(moved, fused(moved, there, "triton"), there)
    assert all(torch.equal(again[name], got[name]) for name in got)


def test_one_launch_forward_and_one_backward() -> None:
    from bench.memory import count_launches

    given = on_gpu(problem(5, 9, 4, 64, position="after_padding", dtype=torch.bfloat16))
    prompt, weight = given.leaves()
    weight.requires_grad_(False)
    device = weight.device
    assert count_launches(lambda: fused(given, [prompt, weight], "triton"), device) == 1

    def both() -> None:
        gradients(given, fused(given, [prompt, weight], "triton"), [prompt, weight])

    assert count_launches(both, device) == 2


def test_an_id_outside_the_table_gives_nan_and_the_device_lives_on() -> None:
    ids = torch.tensor([[1, 10, -100, 2**40]], device="cuda")
    table = torch.randn(10, 64, device="cuda", requires_grad=True)
    out = prompt_embedding(ids, table, torch.randn(2, 64, device="cuda")).embeddings
    assert out[0, 3:].isnan().all() and out[0, :3].isfinite().all()
    out.nan_to_num().sum().backward()
    assert table.grad is not None and table.grad[1].eq(1).all()
    assert table.grad.sum() == 64


def test_a_captured_graph_replays_with_other_ids() -> None:
    given = on_gpu(problem(5, 9, 4, 64, position="after_padding"))
    prompt, weight = given.leaves()
    fused(given, [prompt, weight], "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(given, [prompt, weight], "triton")
    given.input_ids.copy_((given.input_ids + 1) % 11)
    graph.replay()
    assert torch.equal(captured.embeddings, fused(given, [prompt, weight], "triton").embeddings)


def test_outputs_beyond_two_to_the_31_elements() -> None:
    ids = torch.randint(100, (2, 270_000), device="cuda")
    table = torch.randn(100, 4096, device="cuda", dtype=torch.float16)
    prompt = torch.randn(3, 4096, device="cuda", dtype=torch.float16, requires_grad=True)
    out = prompt_embedding(ids, table, prompt).embeddings
    assert out.numel() > 2**31
    assert torch.equal(out[1, -1], table[ids[1, -1]])
    (found,) = torch.autograd.grad(out, [prompt], torch.ones_like(out))
    assert (found == 2).all()
