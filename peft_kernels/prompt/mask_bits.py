"""An attention mask of any dtype as integers of its size: kernels copy bits and test for zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskBits(NamedTuple):
    """How a dtype writes its numbers.

    Attributes:
        one: the bits of 1.
        significant: the bits of which one is set in every number but zero: all but a float's sign.
    """

    one: int
    significant: int


_BITS = {
    torch.float64: MaskBits(0x3FF0000000000000, 2**63 - 1),
    torch.float32: MaskBits(0x3F800000, 2**31 - 1),
    torch.float16: MaskBits(0x3C00, 2**15 - 1),
    torch.bfloat16: MaskBits(0x3F80, 2**15 - 1),
}


def bits(dtype: torch.dtype) -> MaskBits:
    """Return how ``dtype`` writes 1 and 0."""
    return _BITS.get(dtype, MaskBits(1, -1))


def as_integers(mask: Tensor) -> Tensor:
    """Return ``mask`` viewed as integers of its element size."""
    return mask.view(_INTEGER[mask.element_size()])
