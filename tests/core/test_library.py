"""Ops where tensors have no data, or where what runs is recorded by torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import peft_kernels


def _lora_linear(x: Tensor, *given: Tensor) -> Tensor:
    return peft_kernels.lora_linear(x, *given, scale=0.3, dropout_p=0.5)


def _dora_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return peft_kernels.dora_linear(x, w, a, b, w.detach().norm(dim=1), scale=0.3, dropout_p=0.5)


def _lora_projections(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    ys = peft_kernels.lora_projections(x, [w, w], [a, a], [b, b], scales=[0.3, 0.7])
    return torch.stack(ys)


def _adapter(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return peft_kernels.adapter(x, a, b, scale=0.3)


def _prefix_attention(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    query = x.unflatten(-1, (2, 3)).movedim(-2, 1)
    prefix = a.unflatten(-1, (2, 3)).movedim(-2, 0)
    return peft_kernels.prefix_attention(query, query, query, prefix, prefix, scale=0.3)


def _prompt_embedding(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    return peft_kernels.prompt_embedding(ids, w, a).embeddings


CALLS = (
    _lora_linear,
    _dora_linear,
    _lora_projections,
    _adapter,
    _prefix_attention,
    _prompt_embedding,
)


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (2, 4, 6), (6, 6), (3, 6), (6, 3)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def result_and_gradients(call: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    y = call(*given)
    gradients = torch.autograd.grad(y.square().sum(), given, allow_unused=True)
    return [y.detach(), *(each for each in gradients if each is not None)]


@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors_give_shapes(call: Callable[..., Tensor]) -> None:
    expected = result_and_gradients(call, tensors())
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(each) for each in tensors()]
        y = call(*given)
    # Backward is called outside the mode as often as inside it.
    gradients = torch.autograd.grad(y.square().sum(), given, allow_unused=True)
    found = [y, *(each for each in gradients if each is not None)]
    assert all(isinstance(each, FakeTensor) for each in found)
    assert [each.shape for each in found] == [each.shape for each in expected]
    with mode:
        given = [mode.from_tensor(each.detach()) for each in tensors()]
        assert call(*given).shape == expected[0].shape


@pytest.mark.parametrize("call", CALLS)
def test_a_traced_graph_holds_the_op(call: Callable[..., Tensor]) -> None:
    # Traced with one x and run with another, which must not give what lay in memory.
    x, *others = (each.detach() for each in tensors())

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return call(x, *others)

    graph = make_fx(run, tracing_mode="real")(x)
    assert "peft_kernels" in graph.code
    other = torch.randn_like(x)
    torch.manual_seed(1)
    actual = graph(other)
    torch.testing.assert_close(actual, run(other))
