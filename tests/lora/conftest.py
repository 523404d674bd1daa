"""Fixtures of the LoRA tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh floating-point allocation with NaN, so that an unwritten element shows."""

    def poisoned(allocate):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the name of every Triton kernel that the interpreter launches."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    names: list[str] = []
    run = interpreter.InterpretedFunction.run

    def recorded(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        names.append(self.fn.__name__)
        # What the interpreter copies to and fro is no operation of the launcher's.
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", recorded)
    yield names
