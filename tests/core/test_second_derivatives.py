"""Second derivatives are refused, whatever gradient arrives: none is ever zero without a word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_kernels import (
    adapter,
    dora_linear,
    lora_embedding,
    lora_linear,
    lora_projections,
    prefix_attention,
    prompt_embedding,
)

IDS = torch.tensor([[1, 5, 2]])
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "lora_linear": lambda t: lora_linear(t, t, t, t),
    "dora_linear": lambda t: dora_linear(t, t, t, t, t[0]),
    "lora_projections": lambda t: lora_projections(t, [t], [t], [t])[0],
    "lora_embedding": lambda t: lora_embedding(IDS, t, t, t),
    "adapter": lambda t: adapter(t, t, t, activation="gelu"),
    "prefix_attention": lambda t: prefix_attention(
        t[None, None], t[None, None], t[None, None], t[None], t[None]
    ),
    "prompt_embedding": lambda t: prompt_embedding(IDS, t, t).embeddings,
}


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "of the result"])
@pytest.mark.parametrize("name", CALLS)
def test_differentiating_twice_raises(name: str, constant: bool) -> None:
    leaf = torch.randn(8, 8, requires_grad=True)

    def gradient(create_graph: bool) -> Tensor:
        y = CALLS[name](leaf)
        loss = y.sum() if constant else y.square().sum()
        (found,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
        return found

    first = gradient(create_graph=True)
    torch.testing.assert_close(first, gradient(create_graph=False))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
