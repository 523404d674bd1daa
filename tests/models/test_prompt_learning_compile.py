"""torch.compile of a whole model whose prompt learning peft built and ``accelerate`` fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels import accelerate

GIVEN: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
KINDS = {
    "prompt": PromptTuningConfig(**GIVEN),
    "p-tuning": PromptEncoderConfig(**GIVEN, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(**GIVEN),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_whose_labels_are_its_ids_is_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), KINDS[kind])
    accelerate(model, strict=True)
    ids = torch.randint(64, (2, 5))
    given = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for each in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        loss = each(**given).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) > 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
