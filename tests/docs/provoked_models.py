"""Provokes what the page says under "Models"."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import (
    LoRALinear,
    accelerate,
    attach_prefixes,
    load_adapter,
    replace,
    save_adapter,
)
from peft_kernels.models.parallel.layers import check_layer
from tests.docs.provoked import provokes


def _llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, **options,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).requires_grad_(False)
    return model


def _of_peft(*layers: nn.Module, targets: list[str]) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets)
    made: nn.Module = peft.get_peft_model(nn.Sequential(*layers), config)
    return made


IDS = torch.tensor([[1, 2, 3]])


@provokes("model has no adapter layer that peft or adapters made")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    accelerate(nn.Sequential(nn.Linear(4, 4)))


@provokes("no adapter layer of the model can be accelerated:")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    accelerate(_of_peft(nn.Conv1d(4, 4, 1), targets=["0"]))


@provokes("strict=True, and these adapter layers cannot be accelerated:")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    model = _of_peft(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), targets=["0", "1"])
    accelerate(model, strict=True)


@provokes("peft … is installed, accelerate knows 0.18 and later")
def _(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(pytest.importorskip("peft"), "__version__", "0.17.1")
    accelerate(_of_peft(nn.Linear(4, 4), targets=["0"]))


@provokes("model has parameters on the meta device (…)")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    accelerate(_of_peft(nn.Linear(4, 4), targets=["0"]).to("meta"))


@provokes("layers were run without recording gradients, and the embeddings do not need any")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(_llama(), config)
    accelerate(model)
    for layer in model.base_model.model.layers:
        layer.forward = partial(_checkpointed, layer.forward)
    model(input_ids=IDS, labels=IDS)


def _checkpointed(forward: Any, hidden: torch.Tensor, **options: Any) -> Any:
    return checkpoint(partial(forward, **options), hidden, use_reentrant=True)


@provokes("the model's attention implementation was changed to …, which ignores the prefixes")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    model: Any = _llama()
    attach_prefixes(model, num_virtual_tokens=2)
    model.set_attn_implementation("eager")
    model(input_ids=IDS)


@provokes("attention_mask must be the 2-D mask of padding [B, positions]")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    model = _llama()
    attach_prefixes(model, num_virtual_tokens=2)
    model(input_ids=IDS, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


@provokes("model has no layers of peft_kernels: place some")
def _(_: pytest.MonkeyPatch, folder: Path) -> None:
    save_adapter(nn.Sequential(nn.Linear(4, 4)), folder)


@provokes("the prefixes were attached without shift_positions=True")
def _(_: pytest.MonkeyPatch, folder: Path) -> None:
    model = _llama()
    attach_prefixes(model, num_virtual_tokens=2)
    save_adapter(model, folder, task_type="CAUSAL_LM")


@provokes('task_type must be given, for instance "CAUSAL_LM"')
def _(_: pytest.MonkeyPatch, folder: Path) -> None:
    model = _llama()
    attach_prefixes(model, num_virtual_tokens=2, shift_positions=True)
    save_adapter(model, folder)


@provokes(
    "peft looks for … in an adapter of task_type=…, and only the layers of peft_kernels are saved"
)
def _(_: pytest.MonkeyPatch, folder: Path) -> None:
    save_adapter(LoRALinear(8, 8, r=2, lora_alpha=4), folder, task_type="SEQ_CLS")


@provokes("… has peft_type=…, which has no layer here")
def _(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    load_adapter(nn.Sequential(nn.Linear(4, 4)), folder)


def _adapted(width: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, width))
    replace(model, "0", lambda old: LoRALinear.from_linear(old, r=2, lora_alpha=4))  # type: ignore[arg-type]
    return model


@provokes("… holds its tensors as a pickle, …, which can run any code and is never loaded")
def _(_: pytest.MonkeyPatch, folder: Path) -> None:
    save_adapter(_adapted(4), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    load_adapter(_adapted(4), folder)


@provokes("… does not fit the model, nothing was changed:")
def _(_: pytest.MonkeyPatch, folder: Path) -> None:
    save_adapter(_adapted(4), folder)
    load_adapter(_adapted(8), folder)


@provokes("LoRAColwiseParallel and LoRARowwiseParallel take a LoRALinear or peft's LoRA Linear")
def _(_: pytest.MonkeyPatch, __: Path) -> None:
    # What both styles ask before they look at the ranks.
    check_layer(nn.Linear(4, 4))
