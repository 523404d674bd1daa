"""Floating-point operations of LoRA's ops, as torch's ``FlopCounterMode`` counts them.

Two for a product and a sum, of matrix products alone. The arguments are the ops' own, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def of_forward(given: Mapping[str, Any]) -> int:
    """Return those of x Wᵀ, x Aᵀ and (x Aᵀ) Bᵀ."""
    return _forward(given["x"], given["weight"], given["lora_a"])


def of_backward(given: Mapping[str, Any]) -> int:
    """Return those of the gradients that are asked for."""
    wanted = [given[name] is not None for name in ("dx", "da", "db", "dweight")]
    return _backward(given["x"], given["weight"], given["lora_a"], *wanted)


def of_projections_forward(given: Mapping[str, Any]) -> int:
    """Return those of every projection."""
    pairs = zip(given["weights"], given["lora_as"], strict=True)
    return sum(_forward(given["x"], weight, lora_a) for weight, lora_a in pairs)


def of_projections_backward(given: Mapping[str, Any]) -> int:
    """Return those of the gradients that ``places`` names: see the op."""
    weights, places = given["weights"], set(given["places"])
    count = len(weights)
    return sum(
        _backward(
            given["x"], weight, lora_a, 0 in places,
            *(1 + kind * count + i in places for kind in (0, 1, 3)),
        )
        for i, (weight, lora_a) in enumerate(zip(weights, given["lora_as"], strict=True))
    )  # fmt: skip


def _sizes(x: Tensor, weight: Tensor, lora_a: Tensor) -> Sequence[int]:
    """Return tokens, features in and out, and the rank."""
    out_features, in_features = weight.shape
    return x.shape[:-1].numel(), in_features, out_features, lora_a.shape[0]


def _forward(x: Tensor, weight: Tensor, lora_a: Tensor) -> int:
    m, k, n, r = _sizes(x, weight, lora_a)
    return 2 * m * (k * n + r * (k + n))


def _backward(
    x: Tensor, weight: Tensor, lora_a: Tensor, dx: bool, da: bool, db: bool, dweight: bool
) -> int:
    m, k, n, r = _sizes(x, weight, lora_a)
    ds = dx or da
    return 2 * m * (k * n * (dx + dweight) + r * (n * (ds + db) + k * (dx + da)))
