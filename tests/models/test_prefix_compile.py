"""torch.compile of a whole transformers model with prefixes."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import attach_prefixes
from tests.models.prefixed_models import batch, llama4, make

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral"])
def test_a_model_with_a_mask_compiles_without_a_break(family: str) -> None:
    model, given = make(family), batch()
    mask = torch.ones_like(given["input_ids"])
    mask[0, :2] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for each in (model, compiled):
        model.zero_grad()
        logits = each(input_ids=given["input_ids"], attention_mask=mask).logits[:, 2:]
        logits.square().mean().backward()
        losses.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(losses[0]) > 2
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_without_a_mask_the_graph_breaks_where_the_pattern_is_looked_at() -> None:
    """There transformers combines its patterns in a closure, which a traced function cannot see."""
    model, ids = make("llama"), batch()["input_ids"]
    found = torch.compile(model, backend="aot_eager")(input_ids=ids).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_chunks_are_refused_by_name_in_a_traced_call_too() -> None:
    model = llama4()
    attach_prefixes(model, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="chunked attention has no kernel"):
        torch.compile(model, backend="eager")(**batch("left"))
