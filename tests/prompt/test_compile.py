"""torch.compile: no graph break, no recompilation over batches, ops that pass opcheck."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from peft_kernels import PromptEmbedding, prompt_embedding
from tests.prompt.problems import assert_same, fused, gradients, problem

pytestmark = pytest.mark.timeout(300)
POSITIONS = pytest.mark.parametrize("position", ["start", "after_padding", 2])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@POSITIONS
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("extras", [True, False], ids=["mask-and-labels", "bare"])
def test_fullgraph_gives_what_eager_gives(compiler: str, position: str | int, extras: bool) -> None:
    padding = "left" if extras else None
    given = problem(5, 9, 4, 8, position=position, padding=padding, labels=extras, padding_idx=3)
    compiled = torch.compile(
        lambda prompt, weight: fused(given, [prompt, weight], None),
        fullgraph=True,
        backend=compiler,
    )
    leaves, others = given.leaves(), given.leaves()
    output, expected = compiled(*leaves), fused(given, others, None)
    for name in expected._fields:
        assert_same(getattr(output, name), getattr(expected, name), name)
    found, wanted = gradients(given, output, leaves), gradients(given, expected, others)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_ids_that_are_labels_or_mask_too_compile() -> None:
    """As a causal language model is trained: its labels are its ids."""
    ids, table = torch.randint(1, 20, (4, 6)), torch.randn(20, 8)
    leaf = torch.randn(3, 8, requires_grad=True)

    def call(ids: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return prompt_embedding(ids, table, prompt, attention_mask=ids, labels=ids)

    found = []
    for each in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        out = each(ids, leaf)
        found.append([*out, *torch.autograd.grad(out[0].square().sum(), leaf)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_no_recompilation_over_batches_and_columns() -> None:
    layer = PromptEmbedding(torch.nn.Embedding(20, 8), num_virtual_tokens=3)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def run(ids: torch.Tensor, mask: torch.Tensor, column: int) -> torch.Tensor:
        weight, prompt = layer.embedding.weight, layer.prompt
        return prompt_embedding(
            ids, weight, prompt, attention_mask=mask, position=column
        ).embeddings

    frames = []
    for step in range(6):
        ids = torch.randint(20, (3 + step, 10 + step))
        mask = torch.ones_like(ids)
        expected = prompt_embedding(
            ids, layer.embedding.weight, layer.prompt, attention_mask=mask, position=2 + step
        )
        assert torch.equal(run(ids, mask, 2 + step), expected.embeddings)
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 5 and frames[1] <= 2


def test_the_layer_compiles_whole_with_its_projection() -> None:
    layer = PromptEmbedding(
        torch.nn.Embedding(20, 8), num_virtual_tokens=3, prompt_projection=True,
        position="after_padding",
    )  # fmt: skip
    ids, mask = torch.randint(20, (4, 6)), torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = compiled(ids, mask), layer(ids, mask)
    torch.testing.assert_close(found.embeddings, expected.embeddings)
    assert torch.equal(found.position_ids, expected.position_ids)


def test_a_bad_id_raises_with_its_text_under_compile_too() -> None:
    run = torch.compile(
        lambda ids: prompt_embedding(ids, torch.zeros(4, 2), torch.zeros(1, 2)).embeddings,
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(IndexError, match="got 9 at"):
        run(torch.tensor([[1, 9]]))


@POSITIONS
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_opcheck(position: str | int, per_sample: bool) -> None:
    given = problem(5, 9, 4, 8, position=position, per_sample=per_sample)
    starts = torch.empty(5, dtype=torch.int64) if position == "after_padding" else None
    column = position if isinstance(position, int) else 0
    embeddings = torch.empty(5, 13, 8)
    integers = [torch.empty(5, 13, dtype=torch.int64) for _ in range(3)]
    torch.library.opcheck(
        torch.ops.peft_kernels.prompt_forward.default,
        (
            given.input_ids, given.weight, given.prompt, given.mask, given.labels, column, None,
            embeddings, *integers, starts,
        ),
    )  # fmt: skip
    d_prompt, d_weight = torch.empty_like(given.prompt), torch.empty_like(given.weight)
    dy, ids = given.d_embeddings, given.input_ids
    if starts is not None:
        starts.fill_(2)
    for table in (None, d_weight):
        torch.library.opcheck(
            torch.ops.peft_kernels.prompt_backward.default,
            (dy, None if table is None else ids, starts, column, -1, None, d_prompt, table),
        )


def test_checkpointing_inside_compile_reproduces_eager_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    given = problem(5, 9, 4, 8, position="after_padding")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(prompt: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return checkpoint(
            lambda *t: fused(given, list(t), None).embeddings.relu(),
            prompt, weight, use_reentrant=False,
        )  # fmt: skip

    leaves, others = given.leaves(), given.leaves()
    run(*leaves).backward(given.d_embeddings)
    fused(given, others, None).embeddings.relu().backward(given.d_embeddings)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, others, strict=True))


def test_an_exported_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    layer, ids = (
        PromptEmbedding(torch.nn.Embedding(10, 4), num_virtual_tokens=2),
        torch.tensor([[1, 2]]),
    )
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer.eval(), (ids,)), path)
    found = torch.export.load(path).module()(ids)
    assert torch.equal(found.embeddings, layer(ids).embeddings)
