"""``PromptEmbedding``: initialisation, sharing, training, state dicts, the projection."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from peft_kernels import PromptEmbedding, explain, prompt_embedding


def layer(**options: Any) -> PromptEmbedding:
    """Return a layer of 3 virtual tokens over a table of [20, 8]."""
    embedding = options.pop("embedding", None) or nn.Embedding(20, 8, padding_idx=0)
    return PromptEmbedding(embedding, **{"num_virtual_tokens": 3, **options})


IDS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
MASK = (IDS != 0).long()


def test_it_gives_what_the_function_gives() -> None:
    made = layer(position="after_padding")
    found = made(IDS, MASK, IDS)
    expected = prompt_embedding(
        IDS, made.embedding.weight, made.prompt, attention_mask=MASK, labels=IDS,
        position="after_padding",
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    made.position = 1
    assert torch.equal(made(IDS).embeddings[:, 1:4], made.prompt.expand(2, 3, 8))


def test_the_table_is_shared_and_frozen_and_the_prompt_trained() -> None:
    embedding = nn.Embedding(20, 8)
    made = layer(embedding=embedding)
    assert made.embedding.weight is embedding.weight
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["prompt"]
    made(IDS).embeddings.square().sum().backward()
    assert embedding.weight.grad is None
    torch.testing.assert_close(made.prompt.grad, 4 * made.prompt.detach())


def test_a_table_that_is_trained_gets_a_gradient_but_for_padding() -> None:
    made = layer()
    made.embedding.weight.requires_grad_(True)
    made(IDS).embeddings.sum().backward()
    expected = torch.zeros(20, 8)
    expected[IDS[IDS != 0]] = 1
    assert torch.equal(made.embedding.weight.grad, expected)


def test_random_takes_the_spread_of_the_table() -> None:
    embedding = nn.Embedding(5000, 64)
    nn.init.normal_(embedding.weight, std=0.02)
    made = layer(embedding=embedding, num_virtual_tokens=100)
    assert 0.018 < made.prompt.std() < 0.022
    assert made.prompt.abs().min() > 0


def test_vocab_takes_rows_that_are_not_padding() -> None:
    embedding = nn.Embedding(4, 8, padding_idx=2)
    nn.init.normal_(embedding.weight)
    made = layer(embedding=embedding, num_virtual_tokens=60, init="vocab")
    rows = [(embedding.weight == row).all(1).nonzero().item() for row in made.prompt]
    assert set(rows) == {0, 1, 3}
    made.prompt.data.zero_()
    assert embedding.weight.abs().sum() > 0, "a copy, not a view"


@pytest.mark.parametrize(
    ("ids", "rows"),
    [([5], [5, 5, 5]), ([5, 6], [5, 6, 5]), (torch.tensor([1, 2, 3, 4]), [1, 2, 3])],
)
def test_token_ids_are_repeated_or_cut_as_peft_does(ids: Any, rows: list[int]) -> None:
    made = layer(init=ids)
    assert torch.equal(made.prompt, made.embedding.weight[rows])


def test_a_tensor_is_copied() -> None:
    values = torch.randn(3, 8)
    made = layer(init=values)
    assert torch.equal(made.prompt, values)
    made.prompt.data.zero_()
    assert values.abs().sum() > 0


def test_the_prompt_may_be_float32_beside_a_bfloat16_table() -> None:
    made = layer(embedding=nn.Embedding(20, 8).bfloat16(), dtype=torch.float32)
    out = made(IDS)
    out.embeddings.sum().backward()
    assert out.embeddings.dtype == torch.bfloat16
    assert made.prompt.dtype == made.prompt.grad.dtype == torch.float32
    assert layer(embedding=nn.Embedding(20, 8).bfloat16()).prompt.dtype == torch.bfloat16


class _Scaled(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"embedding": nn.Linear(2, 2)}, TypeError, "embedding must be a torch.nn.Embedding"),
        ({"embedding": _Scaled(20, 8)}, TypeError, "forward may differ"),
        ({"embedding": nn.Embedding(20, 8, max_norm=1.0)}, ValueError, "max_norm=1.0"),
        ({"embedding": nn.Embedding(20, 8, sparse=True)}, ValueError, "sparse=True"),
        (
            {"embedding": nn.Embedding(20, 8, scale_grad_by_freq=True)},
            ValueError,
            "scale_grad_by_freq=True",
        ),
        ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be an integer of at"),
        ({"num_virtual_tokens": True}, ValueError, "num_virtual_tokens"),
        ({"init": "text"}, TypeError, "init must be 'random', 'vocab'"),
        ({"init": 5}, TypeError, "init must be 'random', 'vocab'"),
        ({"init": torch.randn(2, 8)}, ValueError, r"init must have shape \[3, 8\], got \[2, 8\]"),
        ({"init": []}, ValueError, "at least one"),
        ({"init": torch.ones(3, 8, dtype=torch.int64)}, ValueError, "list of token ids"),
        ({"init": [1, 20]}, ValueError, r"init must hold ids in 0..19, got 1..20"),
        ({"init": [1.5]}, TypeError, "integer token ids"),
        ({"init": [True]}, TypeError, "integer token ids"),
        (
            {"embedding": nn.Embedding(1, 8, padding_idx=0), "init": "vocab"},
            ValueError,
            "a row that is not padding_idx",
        ),
        ({"prompt_projection": True, "projection_hidden": 0}, ValueError, "projection_hidden"),
        ({"projection_hidden": 8}, ValueError, "without prompt_projection=True"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        layer(**options)


def test_a_bad_position_is_refused_by_the_call() -> None:
    with pytest.raises(ValueError, match="position must be 'start'"):
        layer(position="end")(IDS)


def test_a_refused_embedding_is_not_frozen() -> None:
    embedding = nn.Embedding(20, 8)
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        PromptEmbedding(embedding, num_virtual_tokens=0)
    with pytest.raises(TypeError, match="init"):
        PromptEmbedding(embedding, num_virtual_tokens=1, init="text")
    assert embedding.weight.requires_grad


def test_from_embedding_keeps_the_training_mode() -> None:
    embedding = nn.Embedding(20, 8).eval()
    made = PromptEmbedding.from_embedding(embedding, num_virtual_tokens=2, init="vocab", position=1)
    assert not made.training and made.position == 1 and made.embedding is embedding


def test_state_dict_keys_and_round_trips() -> None:
    made = layer()
    assert sorted(made.state_dict()) == ["embedding.weight", "prompt"]
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    other = layer()
    other.load_state_dict(torch.load(buffer))
    for same in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(same(IDS).embeddings, made(IDS).embeddings)


def test_the_projection_is_pefts_mlp_and_runs_once_a_step() -> None:
    made = layer(prompt_projection=True, projection_hidden=12)
    assert made.projection is not None
    shapes = [(m.in_features, m.out_features) for m in made.projection if isinstance(m, nn.Linear)]
    assert shapes == [(8, 12), (12, 12), (12, 8)]
    seen = []
    made.projection.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    out = made(IDS)
    assert seen == [(3, 8)]
    out.embeddings[:, :3].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.projection.parameters())
    assert made.prompt.grad is not None and made.prompt.grad.abs().sum() > 0


def test_folding_changes_no_bit_and_drops_the_projection() -> None:
    made = layer(prompt_projection=True)
    before = made(IDS).embeddings.detach()
    assert [k for k in made.state_dict() if k.startswith("projection")] == [
        f"projection.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    ]
    made.fold()
    assert torch.equal(made(IDS).embeddings, before)
    assert sorted(made.state_dict()) == ["embedding.weight", "prompt"]
    plain = layer()
    plain.load_state_dict(made.state_dict())
    assert torch.equal(plain(IDS).embeddings, before)
    with pytest.raises(RuntimeError, match="no projection"):
        made.fold()


def test_a_step_of_an_optimiser_moves_the_prompt_alone() -> None:
    made = layer()
    table, before = made.embedding.weight.clone(), made.prompt.detach().clone()
    optimiser = torch.optim.AdamW((p for p in made.parameters() if p.requires_grad), lr=0.1)
    made(IDS).embeddings.square().mean().backward()
    optimiser.step()
    assert torch.equal(made.embedding.weight, table)
    assert (made.prompt != before).all()


def test_explain_and_repr() -> None:
    made = layer(position=2)
    made.backend = "reference"
    assert explain(made, IDS, MASK).backend == "reference"
    assert "num_virtual_tokens=3, position=2" in repr(made)


def test_a_projection_under_autocast_of_the_other_16_bits() -> None:
    """Its MLP gives float16 there, beside a table in bfloat16."""
    table = nn.Embedding(10, 4).bfloat16()
    layer = PromptEmbedding(table, num_virtual_tokens=2, prompt_projection=True)
    with torch.autocast("cpu", torch.float16):
        found = layer(torch.tensor([[1, 2]])).embeddings
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert layer.prompt.grad is not None


def test_first_rows_by_ids_under_a_default_device() -> None:
    table = nn.Embedding(10, 4)
    with torch.device("meta"):
        layer = PromptEmbedding(table, num_virtual_tokens=2, init=[1, 3])
    assert torch.equal(layer.prompt, table.weight[[1, 3]])
