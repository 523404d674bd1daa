"""Checks that ranks run together: peft's own LoRA layers, tensor-parallel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_kernels import LoRAColwiseParallel
from tests.distributed.models import PROJECTIONS, assert_same_losses, llama, train
from tests.distributed.parallel_layers import styled
from tests.distributed.tensor_parallel import tensor_parallel


def wrapped(**options: object) -> nn.Module:
    """Return the Llama with peft's LoRA in every projection, the same on every rank."""
    import peft

    model = llama()
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=list(PROJECTIONS), init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config)


def losses() -> None:
    """In peft's own forward, with a bias in the low-rank branch too."""
    expected = train(wrapped(lora_bias=True))
    model = wrapped(lora_bias=True)
    tensor_parallel(model.get_base_model())
    assert all(
        isinstance(each, DTensor) for name, each in model.named_parameters() if "lora_" in name
    )
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
    {f"peft_{check.__name__}": check for check in (losses, refusals)}
    if importlib.util.find_spec("peft")
    else {}
)
