"""What tests of accelerated LoRA models share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_kernels import lora_linear, lora_projections


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows by the dropout of each layer that a kernel computes."""
    # Not in the adapters environment, which has no peft.
    from peft_kernels.models.fused import peft_lora, projections

    calls: list[float] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["dropout_p"])
        return lora_linear(*args, **kwargs)

    def counted_together(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        calls.extend(kwargs["dropout_p"])
        return lora_projections(*args, **kwargs)

    monkeypatch.setattr(peft_lora, "lora_linear", counted)
    monkeypatch.setattr(projections, "lora_projections", counted_together)
    return calls
