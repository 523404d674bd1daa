"""Floating-point operations of the adapter's ops, as torch's ``FlopCounterMode`` counts them.

Two for a product and a sum, of matrix products alone. The arguments are the ops' own, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of_forward(given: Mapping[str, Any]) -> int:
    """Return those of down and up."""
    return 2 * _product(given)


def of_backward(given: Mapping[str, Any]) -> int:
    """Return those of the gradients that are asked for."""
    through = any(given[name] is not None for name in ("dx", "d_down", "d_down_bias"))
    wanted = sum(given[name] is not None for name in ("dx", "d_down", "d_up"))
    return (int(through) + wanted) * _product(given)


def _product(given: Mapping[str, Any]) -> int:
    """Return those of one product of all rows; rows without an adapter are counted too."""
    bottleneck, features = given["down"].shape[-2:]
    return int(2 * given["x"].shape[:-1].numel() * features * bottleneck)
