"""Checks that ranks run together: peft's LoRA layers, as they are and accelerated."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from peft_kernels import LoRAColwiseParallel, accelerate
from tests.distributed.data_parallel import shard
from tests.distributed.models import PROJECTIONS, assert_same_losses, llama, train, train_apart
from tests.distributed.parallel_layers import styled
from tests.distributed.tensor_parallel import PLAN, mesh, tensor_parallel


def wrapped(**options: object) -> nn.Module:
    """Return the Llama with peft's LoRA in every projection, the same on every rank."""
    import peft

    model = llama()
    torch.manual_seed(1)
    given = {"r": 3, "lora_alpha": 6, "target_modules": list(PROJECTIONS)} | options
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **given))


def losses() -> None:
    """In peft's own forward, with a bias in the low-rank branch too."""
    expected = train(wrapped(lora_bias=True))
    model = wrapped(lora_bias=True)
    tensor_parallel(model.get_base_model())
    assert all(
        isinstance(each, DTensor) for name, each in model.named_parameters() if "lora_" in name
    )
    assert_same_losses(train(model), expected)


def accelerated(options: dict[str, object], engine: str) -> None:
    """The losses of peft's own layers on one process."""
    expected = train(wrapped(**options))
    model = wrapped(**options)
    assert len(accelerate(model, strict=True).accelerated) == 14
    if engine == "tp":
        tensor_parallel(model.get_base_model())
        assert_same_losses(train(model), expected)
    elif engine == "ddp":
        assert_same_losses(train_apart(DistributedDataParallel(model)), expected)
    else:
        assert_same_losses(train_apart(shard(model)), expected)


def accelerated_tp_with_dropout() -> None:
    """A column-parallel layer draws the mask that one process draws."""
    names = ("q_proj", "v_proj", "up_proj")
    options = {"target_modules": list(names), "lora_dropout": 0.5}
    one = wrapped(**options)
    accelerate(one, projections=False)
    torch.manual_seed(9)
    expected = train(one)
    model = wrapped(**options)
    accelerate(model)
    whole = LoRAColwiseParallel(output_layouts=Replicate())
    plan = {key: whole for key in PLAN if key.endswith(names)}
    parallelize_module(model.get_base_model(), mesh(), plan)
    torch.manual_seed(9)
    assert_same_losses(train(model), expected)


def refusals() -> None:
    """What would be computed otherwise than on one rank."""
    linear = "base_model.model.model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match="variants: default"):
        styled(wrapped(use_dora=True).get_submodule(linear), LoRAColwiseParallel())
    layer = styled(wrapped(lora_dropout=0.5).get_submodule(linear), LoRAColwiseParallel())
    x = torch.randn(4, 32)
    layer.eval()(x)
    with pytest.raises(ValueError, match="accelerate the model first"):
        layer.train()(x)


CHECKS: dict[str, Callable[[], None]] = (
    {
        "peft_losses": losses,
        "peft_refusals": refusals,
        "peft_accelerated_tp": functools.partial(accelerated, {"lora_bias": True}, "tp"),
        "peft_accelerated_tp_with_dropout": accelerated_tp_with_dropout,
        "peft_accelerated_ddp": functools.partial(accelerated, {}, "ddp"),
        "peft_accelerated_fsdp": functools.partial(accelerated, {"use_dora": True}, "fsdp"),
    }
    if importlib.util.find_spec("peft")
    else {}
)
