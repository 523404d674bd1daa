"""``accelerate`` on LoRA models of peft: the same results, the same model afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_kernels import accelerate, lora_linear
from peft_kernels.models import peft_lora
from tests.models.peft_models import (
    assert_same,
    llama,
    logits_and_gradients,
    lora_config,
    pair,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "ranks": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "trained biases": {"bias": "lora_only"},
}


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows by the dropout of each call of the kernel."""
    calls: list[float] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["dropout_p"])
        return lora_linear(*args, **kwargs)

    monkeypatch.setattr(peft_lora, "lora_linear", counted)
    return calls


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_same_logits_and_gradients(options: dict[str, Any], fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(**options))
    report = accelerate(model, strict=True)
    assert {op for _, op in report.accelerated} == {"lora_linear"}
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == len(report.accelerated) > 0


@pytest.mark.parametrize("biased", [False, True], ids=["bare base", "base with biases"])
def test_bias_of_the_adapter(biased: bool, fused_calls: list[float]) -> None:
    base = llama(attention_bias=biased)
    model, plain = pair(lora_config(target_modules=["q_proj", "v_proj"], lora_bias=biased), base)
    accelerate(model, strict=True)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == 4
