"""Provokes what the page says under "Tensors" and "Layers"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.utils import prune

from peft_kernels import (
    Adapter,
    LoRALinear,
    PrefixAttention,
    PromptEmbedding,
    add_adapters,
    lora_linear,
    prefix_attention,
    prompt_embedding,
    replace,
)
from tests.docs.provoked import provokes


def _call(**changed: Any) -> Tensor:
    tensors: dict[str, Any] = {
        "x": torch.randn(4, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(2, 8, requires_grad=True),
        "lora_b": torch.randn(6, 2),
    }
    return lora_linear(**tensors | changed)


def _wrap(old: nn.Module) -> nn.Module:
    assert isinstance(old, nn.Linear)
    return LoRALinear.from_linear(old, r=2, lora_alpha=4)


@provokes(
    "… must be float64, float32, float16 or bfloat16, got torch.int8. A quantised weight has no "
    "fused kernel here"
)
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _call(weight=torch.ones(6, 8, dtype=torch.int8))


class _Wrapped(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@provokes("… is a …, a quantised or wrapped tensor whose storage the kernels cannot read")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _call(weight=torch.randn(6, 8).as_subclass(_Wrapped))


@provokes("… is a DTensor (a sharded parameter)")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    try:
        _call(weight=distribute_tensor(torch.randn(6, 8), mesh, [Replicate()]))
    finally:
        vars(mesh).clear()  # Else DTensor's caches keep it, and it the threads of the group.
        dist.destroy_process_group()


@provokes(
    "… is torch.float32 and x is torch.bfloat16: cast one of them, or run under "
    "torch.autocast('cpu')"
)
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _call(x=torch.randn(4, 8).bfloat16())


@provokes("… is torch.float16 and x is torch.bfloat16, which do not mix")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    _call(x=x, weight=weight, lora_a=torch.randn(2, 8).half())


@provokes("… is on … while x is on …; move one of them with .to()")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _call(x=torch.randn(4, 8, device="meta"))


@provokes("x must have shape [..., …] to fit weight …")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _call(x=torch.randn(4, 6))


@provokes("dropout_p must lie in [0, 1), got 1.0")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _call(dropout_p=1.0)


@provokes("… does not support torch.func (grad, vmap, jvp and others)")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    torch.func.grad(lambda x: _call(x=x).sum())(torch.randn(4, 8))


@provokes("trying to differentiate twice a function that was marked with @once_differentiable")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(
        _call(x=x, backend="reference").square().sum(), x, create_graph=True
    )
    dx.sum().backward()


@provokes("input_ids must lie in 0..…, the rows of embedding_weight")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    prompt_embedding(torch.tensor([[1, -100]]), torch.randn(10, 4), torch.randn(2, 4))


def _attention(queries: int, **options: Any) -> None:
    query, key, prefix = (
        torch.randn(1, 2, queries, 4),
        torch.randn(1, 2, 3, 4),
        torch.randn(2, 2, 4),
    )
    prefix_attention(query, key, key, prefix, prefix, **options)


@provokes("causal needs at most as many queries as keys")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _attention(5, causal=True)


@provokes("key_mask must be a bool tensor, True = keep")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _attention(3, key_mask=torch.ones(1, 3))


@provokes("from_linear takes a torch.nn.Linear, got …")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    LoRALinear.from_linear(nn.Bilinear(2, 2, 2), r=2, lora_alpha=4)  # type: ignore[arg-type]


@provokes("targets … matched no module; the model has …")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    replace(nn.Sequential(nn.Linear(2, 2)), "q_proj", _wrap)


@provokes("targets match …, whose weight nn.MultiheadAttention reads without calling it")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    replace(nn.TransformerEncoderLayer(8, 2), "out_proj", _wrap)


@provokes("… is merged: its weight holds the update; call .unmerge() before loading")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    layer = LoRALinear(8, 8, r=2, lora_alpha=4)
    layer.merge()
    layer.load_state_dict(layer.state_dict())


@provokes("linear.weight is no parameter but made anew from others")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    pruned = prune.random_unstructured(nn.Linear(8, 8), "weight", amount=0.5)
    LoRALinear.from_linear(pruned, r=2, lora_alpha=4)


@provokes("linear has forward hooks, which the new layer would not run")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda *_: None)
    LoRALinear.from_linear(linear, r=2, lora_alpha=4)


@provokes("this LoRALinear is merged: its output no longer depends on lora_A and lora_B")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    layer = LoRALinear(8, 8, r=2, lora_alpha=4)
    layer.merge()
    layer(torch.randn(2, 8))


@provokes("merging gives a weight that is not finite; nothing was changed")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    layer = LoRALinear(8, 8, r=2, lora_alpha=4, dtype=torch.float16)
    nn.init.constant_(layer.lora_A, 6e4)
    nn.init.constant_(layer.lora_B, 6e4)
    layer.merge()


@provokes("a parallel Adapter needs residual, the output of the layer beside it")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    Adapter(8, bottleneck=2, parallel=True)(torch.randn(2, 8))


@provokes("the width of a …'s output is not known: give d_model")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    add_adapters(nn.Sequential(nn.ReLU()), "0")


@provokes("mha has batch_first=False: this layer takes [B, S, E]")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    PrefixAttention.from_mha(nn.MultiheadAttention(8, 2), num_virtual_tokens=2)


def _layer(**options: Any) -> None:
    x = torch.randn(1, 3, 8)
    PrefixAttention(8, 2, num_virtual_tokens=2)(x, x, x, **options)


@provokes("attn_mask has no kernel unless it is the causal one")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _layer(attn_mask=torch.ones(3, 3, dtype=torch.bool))


@provokes("need_weights=True: the attention weights are never made whole")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    _layer(need_weights=True)


class _Scaled(nn.Embedding):
    """A subclass, as models have that scale their rows."""


@provokes("embedding must be a torch.nn.Embedding, got …")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    PromptEmbedding(_Scaled(10, 4), num_virtual_tokens=2)
