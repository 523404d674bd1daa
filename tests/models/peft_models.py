"""Small models built by peft, and their results, for comparing a model with itself accelerated."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels import LoRALinear, replace

VOCABULARY = 96
SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def llama(**changes: Any) -> LlamaForCausalLM:
    """Return a random Llama of two layers, the same one each time."""
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | changes)))


def lora_config(**options: Any) -> LoraConfig:
    """Return a configuration whose adapters change the model from the first step on."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**(given | options))


def built(config: PeftConfig, base: nn.Module | None = None) -> PeftModel:
    """Return a model that peft built, the same one each time."""
    torch.manual_seed(1)
    return get_peft_model(llama() if base is None else base, config)


def pair(config: PeftConfig, base: nn.Module | None = None) -> tuple[PeftModel, PeftModel]:
    """Return two equal models: one to accelerate, one to compare with."""
    model = built(config, base)
    return copy.deepcopy(model), model


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    """Return token ids [batch, length], the same ones each time."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def logits_and_gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Return the logits of a causal model and the gradients of what is trained, by name."""
    model.zero_grad()
    inputs = {"input_ids": tokens()} | inputs
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that both have the same names, and values equal but for float32's rounding."""
    assert actual.keys() == expected.keys()
    assert any(name.startswith("base_model") and value.any() for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=2e-5, atol=2e-6 + 1e-5 * value.abs().max().item(), msg=name
        )


def seeded_logits(model: nn.Module, seed: int) -> Tensor:
    """Return the logits under a seed, without gradients."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(tokens()).logits


def put_lora(model: nn.Module, targets: Any, **options: Any) -> list[str]:
    """Replace layers of ``model`` by LoRALinear ones that change what it computes."""
    options = {"r": 4, "lora_alpha": 8} | options
    names = replace(model, targets, lambda old: LoRALinear.from_linear(old, **options))  # type: ignore[arg-type]
    for name in names:
        nn.init.normal_(model.get_submodule(name).get_parameter("lora_B"), std=0.1)
    return names
