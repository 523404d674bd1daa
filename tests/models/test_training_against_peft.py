"""Fifty steps of training with peft's own layers and accelerated: the same losses, no dropout.

The selection of ``pytest -m external``: results of other libraries are what is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from peft_kernels import accelerate
from tests.models.peft_models import VOCABULARY, llama, lora_config, pair, tokens

pytestmark = [
    pytest.mark.external,
    *(
        pytest.mark.filterwarnings(f"ignore:{text}")
        for text in ("Position ids are not", "Adapter default was active", "None of the inputs")
    ),
]

STEPS = 50
CAUSAL = {"task_type": "CAUSAL_LM"}


def bert() -> nn.Module:
    """Return a random classifier of two layers, the same one each time."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, num_labels=3, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def lora(**options: Any) -> peft.LoraConfig:
    return lora_config(**({"init_lora_weights": True} | options))


CASES: dict[str, tuple[Callable[[], nn.Module], peft.PeftConfig, set[str]]] = {
    "lora": (llama, lora(), {"lora_linear"}),
    "rslora with biases": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        lora(r=8, use_rslora=True, lora_bias=True, bias="lora_only"),
        {"lora_linear"},
    ),
    "dora": (llama, lora(use_dora=True), {"dora_linear"}),
    "embedding and head": (
        llama,
        lora(target_modules=["embed_tokens", "q_proj", "lm_head"]),
        {"lora_embedding", "lora_linear"},
    ),
    "bert, lora": (bert, lora(task_type="SEQ_CLS"), {"lora_linear"}),
    "prefix": (
        llama, peft.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL), {"prefix_attention"}
    ),
    "projected prefix": (
        llama,
        peft.PrefixTuningConfig(
            num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, **CAUSAL
        ),
        {"prefix_attention"},
    ),
    "prompt": (
        llama, peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL), {"prompt_embedding"}
    ),
    "p-tuning": (
        llama,
        peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **CAUSAL),
        {"prompt_embedding"},
    ),
}  # fmt: skip


def losses(
    model: nn.Module, optimizer_of: Any = torch.optim.AdamW, lr: float = 5e-3
) -> list[float]:
    """Return the losses of STEPS steps on one batch, labels shared by both kinds of model."""
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], lr=lr)
    ids = tokens(4, 16)
    labels = ids if hasattr(model, "prepare_inputs_for_generation") else ids[:, 0] % 3
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_losses_agree(case: tuple[Callable[[], nn.Module], peft.PeftConfig, set[str]]) -> None:
    base, config, ops = case
    model, plain = pair(config, base())
    report = accelerate(model, strict=True)
    assert {op for _, op in report.accelerated} == ops
    ours, theirs = losses(model), losses(plain)
    assert theirs[-1] < theirs[0] - 2e-3
    # Training multiplies the roundings of its first steps.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=1e-6, atol=0.0)


def test_losses_agree_by_sgd() -> None:
    model, plain = pair(lora(r=8))
    accelerate(model)
    ours, theirs = (losses(each, torch.optim.SGD, 0.5) for each in (model, plain))
    assert theirs[-1] < theirs[0] - 0.05
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0.0)
