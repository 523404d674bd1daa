"""Fixtures of the prompt tests; LoRA's recorder of launches is one of them."""

from __future__ import annotations

import pytest
import torch

from tests.lora.conftest import launches

__all__ = ["launches", "poisoned_allocations"]


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh allocation with NaN, or with 99 where it holds integers."""

    def poisoned(allocate):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else 99)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
