"""``prompt_embedding`` around its kernels: errors, what is stored, launches, autograd's demands."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels import BackendUnavailable, PromptOutput, explain, prompt_embedding
from peft_kernels.core import triton_runtime
from tests.prompt.problems import eager, fused, gradients, problem

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
TABLE = torch.randn(10, 4)
PROMPT = torch.randn(2, 4)
ONES = torch.ones(2, 3)

BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
    (
        {"input_ids": [[1]]},
        TypeError,
        "input_ids must be a torch.Tensor of int64 or int32, got [[1",
    ),
    ({"input_ids": IDS[0]}, ValueError, "input_ids must have shape [B, S], got [3]"),
    ({"embedding_weight": TABLE.int()}, TypeError, "embedding_weight must be float64"),
    ({"embedding_weight": TABLE[0]}, ValueError, "embedding_weight must have shape [V, D]"),
    ({"prompt": PROMPT[:, :3]}, ValueError, "prompt must have shape [P, 4] or [B, P, 4]"),
    ({"prompt": PROMPT[0]}, ValueError, "prompt must have shape [P, 4] or [B, P, 4]"),
    ({"prompt": PROMPT.expand(3, 2, 4)}, ValueError, "prompt must have shape [2, P, 4]"),
    (
        {"prompt": PROMPT.half(), "embedding_weight": TABLE.bfloat16()},
        TypeError,
        "do not mix: cast prompt to torch.bfloat16 or float32",
    ),
    ({"prompt": PROMPT.to("meta")}, ValueError, "prompt is on meta while input_ids is on cpu"),
    (
        {"attention_mask": ONES[:, :2]},
        ValueError,
        "attention_mask must have the shape of input_ids, [2, 3], got [2, 2]",
    ),
    ({"attention_mask": ONES[:, None, None]}, ValueError, "attention_mask must have the shape"),
    ({"attention_mask": ONES.to(torch.complex64)}, TypeError, "attention_mask must be int64"),
    ({"attention_mask": [[1]]}, TypeError, "attention_mask must be a torch.Tensor"),
    ({"labels": ONES}, TypeError, "labels must be int64 or int32, got torch.float32"),
    ({"labels": IDS[:1]}, ValueError, "labels must have the shape of input_ids, [2, 3]"),
    ({"position": "end"}, ValueError, "position must be 'start', 'after_padding' or a column 0..3"),
    ({"position": True}, ValueError, "position must be 'start'"),
    ({"position": 4}, ValueError, "position must lie in 0..3, the length of a row, got 4"),
    ({"position": -1}, ValueError, "position must lie in 0..3, the length of a row, got -1"),
    ({"padding_idx": 10}, ValueError, "padding_idx must lie in -10..9, got 10"),
    ({"padding_idx": 1.0}, TypeError, "padding_idx must be an integer"),
    ({"backend": "fastest"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, BackendUnavailable, "cuda: serves NVIDIA GPUs: move the tensors"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_INPUT)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    good: dict[str, Any] = {"input_ids": IDS, "embedding_weight": TABLE, "prompt": PROMPT}
    arguments = good | change
    with pytest.raises(error, match=re.escape(text)):
        prompt_embedding(**arguments)


@pytest.mark.parametrize("backend", ["reference", "cpp", None])
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(10, torch.int64), (-1, torch.int32), (-100, torch.int64), (2**40, torch.int64)],
)
def test_an_id_outside_the_vocabulary_is_an_index_error(
    backend: str | None, bad: int, dtype: torch.dtype
) -> None:
    ids = IDS.clone()
    ids[1, 2] = bad
    text = f"input_ids must lie in 0..9, the rows of embedding_weight, got {bad} at [1, 2]"
    with pytest.raises(IndexError, match=re.escape(text)):
        prompt_embedding(ids.to(dtype), TABLE, PROMPT, backend=backend)


needs_interpreter = pytest.mark.skipif(
    not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
    reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
)


@needs_interpreter
def test_in_triton_an_id_outside_the_vocabulary_gives_nan_and_no_gradient() -> None:
    """There the ids are not looked at; no address outside the table is read or written."""
    ids = torch.tensor([[1, 10, 3], [-100, 5, 2**40]])
    table = TABLE.clone().requires_grad_()
    out = prompt_embedding(ids, table, PROMPT, backend="triton").embeddings
    bad = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    assert out[bad].isnan().all() and out[~bad].isfinite().all()
    (gradient,) = torch.autograd.grad(out, [table], torch.ones_like(out))
    expected = torch.zeros(10, 4)
    expected[[1, 3, 5]] = 1
    assert torch.equal(gradient, expected)


@needs_interpreter
@pytest.mark.parametrize("position", ["start", "after_padding", 2])
def test_one_launch_forward_one_for_the_prompt_and_one_for_the_table(
    position: str | int, launches: list[str]
) -> None:
    given = problem(5, 9, 4, 8, position=position)
    prompt, weight = given.leaves()
    frozen = fused(given, [prompt, weight.detach()], "triton")
    assert launches == ["_prompt_forward_kernel"]
    launches.clear()
    frozen.embeddings.backward(given.d_embeddings)
    assert launches == ["_prompt_gradient_kernel"]
    launches.clear()
    fused(given, [prompt, weight], "triton").embeddings.backward(given.d_embeddings)
    assert launches == [
        "_prompt_forward_kernel", "_prompt_gradient_kernel", "_table_gradient_kernel",
    ]  # fmt: skip


@needs_interpreter
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_bfloat16_rows_are_copied_to_the_bit(per_sample: bool) -> None:
    """The interpreter is refused for bfloat16, whose arithmetic it gets wrong; here is none."""
    from peft_kernels.prompt import launch

    given = problem(
        5, 9, 4, 40, dtype=torch.bfloat16, per_sample=per_sample, position="after_padding"
    )
    expected = eager(given, given.leaves())
    embeddings = torch.empty_like(expected.embeddings)
    integers = [torch.empty(5, 13, dtype=torch.int64) for _ in range(3)]
    launch.prompt_forward(
        given.input_ids, given.weight, given.prompt, given.mask, given.labels, 0,
        embeddings, *integers, torch.empty(5, dtype=torch.int64),
    )  # fmt: skip
    assert torch.equal(embeddings, expected.embeddings)
    assert torch.equal(integers[2], expected.position_ids)


def _saved(call: Callable[[], Tensor], known: tuple[Tensor, ...]) -> int:
    addresses = {t.untyped_storage().data_ptr() for t in known}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in addresses:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(saved.values())


@pytest.mark.parametrize(("position", "expected"), [("start", 0), (2, 0), ("after_padding", 5 * 8)])
@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_stored_but_the_prompts_columns(
    position: str | int, expected: int, trained: bool
) -> None:
    given = problem(5, 9, 4, 8, position=position)
    prompt, weight = given.leaves()
    weight.requires_grad_(trained)
    known = (prompt, weight, given.input_ids)
    assert _saved(lambda: fused(given, [prompt, weight], None).embeddings, known) == expected


def test_backward_allocates_nothing_of_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """[P, D] alone: seen by what PyTorch's profiler calls allocated memory."""
    batch, length, width = 64, 8, 512
    given = problem(batch, 4, length, width, position="after_padding")
    prompt, weight = given.leaves()
    output = fused(given, [prompt, weight.detach()], "cpp").embeddings
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(output, [prompt], given.d_embeddings)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert length * width * 4 <= allocated < 2 * length * width * 4


def test_inputs_are_not_written_to() -> None:
    for backend in ("reference", "cpp"):
        given = problem(5, 9, 4, 8, position="after_padding", padding_idx=2)
        tensors = (
            given.input_ids, given.weight, given.prompt, given.mask, given.labels,
            given.d_embeddings,
        )  # fmt: skip
        before = [t.clone() for t in tensors if t is not None]
        leaves = given.leaves()
        gradients(given, fused(given, leaves, backend), leaves)
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_only_embeddings_are_differentiable() -> None:
    given = problem(2, 3, 2, 4, mask_dtype=torch.float32)
    out = fused(given, given.leaves(), None)
    assert out.embeddings.requires_grad
    assert out.attention_mask is not None and not out.attention_mask.requires_grad
    assert not out.position_ids.requires_grad


def test_a_second_derivative_is_refused() -> None:
    given = problem(2, 3, 2, 4)
    leaves = given.leaves()
    out = fused(given, leaves, None).embeddings
    (first,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_ids_changed_before_backward_are_noticed() -> None:
    given = problem(2, 3, 2, 4)
    out = fused(given, given.leaves(), None).embeddings
    given.input_ids.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("position", ["start", "after_padding", 2])
def test_checkpointing_gives_the_same_gradients(position: str | int) -> None:
    given = problem(5, 9, 4, 8, position=position)
    leaves, others = given.leaves(), given.leaves()

    def block(prompt: Tensor, weight: Tensor) -> Tensor:
        return fused(given, [prompt, weight], None).embeddings.tanh()

    checkpoint(block, *leaves, use_reentrant=False).backward(given.d_embeddings)
    block(*others).backward(given.d_embeddings)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, others, strict=True))


def test_under_autocast_the_result_keeps_the_tables_dtype() -> None:
    """As nn.Embedding's does."""
    given = problem(2, 3, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(given, given.leaves(), None).embeddings.dtype == torch.float32


def test_without_a_prompt_it_is_nn_embedding() -> None:
    table = torch.nn.Embedding(10, 4, padding_idx=-2)
    out = prompt_embedding(IDS, table.weight, PROMPT[:0], padding_idx=-2).embeddings
    assert torch.equal(out, table(IDS))
    (found,) = torch.autograd.grad(out.square().sum(), [table.weight])
    (expected,) = torch.autograd.grad(table(IDS).square().sum(), [table.weight])
    assert torch.equal(found, expected)


def test_explain_names_the_backend_and_checks_as_the_call_does() -> None:
    found = explain(prompt_embedding, IDS, TABLE, PROMPT, backend="reference")
    assert found.backend == "reference" and found.op == "prompt_embedding"
    with pytest.raises(ValueError, match="position must lie in"):
        explain(prompt_embedding, IDS, TABLE, PROMPT, position=9)


def test_the_output_is_a_tuple_in_the_order_of_its_names() -> None:
    embeddings, mask, labels, positions = prompt_embedding(IDS, TABLE, PROMPT)
    assert mask is None and labels is None
    assert PromptOutput._fields == ("embeddings", "attention_mask", "labels", "position_ids")
    assert embeddings.shape == (2, 5, 4) and positions.dtype == torch.int64


@pytest.mark.parametrize(
    "backend", ["cpp", "reference", pytest.param("triton", marks=needs_interpreter)]
)
def test_rows_beyond_two_to_the_31_elements_are_addressed(backend: str) -> None:
    """A table of 4 GiB of which two rows are ever touched, so that it takes no memory."""
    table = torch.empty(2**20 + 8, 2**11, dtype=torch.float16)
    assert table.numel() > 2**31
    last = len(table) - 1
    table[last], table[0] = torch.randn(2, 2**11)
    out = prompt_embedding(torch.tensor([[last, 0]]), table, table[:1].clone(), backend=backend)
    assert torch.equal(out.embeddings, table[[0, last, 0]][None])
