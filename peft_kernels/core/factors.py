"""What a reduction over tokens is asked for: products, their scaling, groups of rows.

The same on every backend: ``core/token_reduction.py`` serves it in Triton,
``core/cuda_reduction.py`` in CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """One of the two products: ``out[j, i] = Σ_m v[m, i] · low[m, j]`` in any strides of out.

    Attributes:
        v: [M, C], unit inner stride.
        low: [M, R], contiguous.
        out: [C, R] as a view of any strides, or None where this product is not needed.
    """

    v: Tensor
    low: Tensor
    out: Tensor | None


@dataclass(frozen=True)
class Scaling:
    """The second product and its column sums, times ``scale · inverse_keep``.

    Attributes:
        scale: a number, or a float32 tensor of 1 or C1 elements.
        inverse_keep: 1 / (1 - p).
        gradient: where the gradient of the scale goes, float32 of as many elements, or None.
        weight: [C1, R], contiguous; what the second product is the gradient of, unscaled.
        bias: [C1] or None; what the column sums are the gradient of.
    """

    scale: float | Tensor
    inverse_keep: float
    gradient: Tensor | None
    weight: Tensor
    bias: Tensor | None

    def kind(self) -> int:
        """Return how the kernel gets the scale: 1 a number, 2 a pointer to one, 3 to C1."""
        if not isinstance(self.scale, Tensor):
            return 1
        return 2 if self.scale.numel() == 1 else 3


@dataclass(frozen=True)
class Groups:
    """Rows in groups, each with sums of its own; outputs then have the group first.

    Attributes:
        order: int64 [M], row numbers, one group after the other.
        offsets: int64 [count + 1], where in ``order`` each group starts, and the last one ends.
        count: number of groups.
    """

    order: Tensor
    offsets: Tensor
    count: int
