"""Floating-point operations of prefix attention's ops, as torch's ``FlopCounterMode`` counts them.

Two for a product and a sum, of matrix products alone; as for SDPA of every pair of a query and a
key, whatever masks hide. The arguments are the ops' own, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of_forward(given: Mapping[str, Any]) -> int:
    """Return those of the scores and of the sums of values."""
    return 2 * (_product(given, "key") + _product(given, "prefix_key"))


def of_backward(given: Mapping[str, Any]) -> int:
    """Return those of the scores again and of the gradients that are asked for."""

    def products(key: str, value: str, others: bool) -> int:
        """Scores, dP, and dQ, dK and dV; without dS only what dV needs."""
        dq, dk, dv = (given[f"d{name}"] is not None for name in ("query", key, value))
        ds = dq or dk or others
        return (ds or dv) + ds + dq + dk + dv

    gated = given["dgate"] is not None
    sequence = products("key", "value", False) * _product(given, "key")
    return sequence + products("prefix_key", "prefix_value", gated) * _product(given, "prefix_key")


def _product(given: Mapping[str, Any], keys: str) -> int:
    """Return those of one product over all pairs with some keys."""
    batch, heads, queries, size = given["query"].shape
    return int(2 * batch * heads * queries * given[keys].shape[-2] * size)
