"""Fixtures of the prefix attention tests."""

from __future__ import annotations

from tests.lora.conftest import launches, poisoned_allocations

__all__ = ["launches", "poisoned_allocations"]
