"""Operands whose rows start at multiples of 16 elements, which kernels copy 16 bytes at a time.

Nearly every call has them. Others are copied once, heads of other sizes padded with zeros: cheaper
than kernels that load an element at a time, and a feature of zeros changes no score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ELEMENTS = 16


def matters(device: torch.device) -> bool:
    """Return whether kernels on ``device`` copy 16 bytes at a time."""
    return device.type == "cuda"


def padding(head_size: int) -> int:
    """Return how many features are missing to the next multiple of 16."""
    return -head_size % _ELEMENTS


def is_aligned(t: Tensor) -> bool:
    """Return whether every row of ``t`` [..., d] starts at a multiple of 16 elements and bytes."""
    strides = t.stride()[:-1]
    return t.data_ptr() % _ELEMENTS == 0 and all(stride % _ELEMENTS == 0 for stride in strides)


def aligned(t: Tensor) -> Tensor:
    """Return ``t`` [..., d], or a copy of it with aligned rows, padded with zeros."""
    missing = padding(t.shape[-1])
    if missing:
        return F.pad(t, (0, missing))
    return t if is_aligned(t) else t.clone(memory_format=torch.contiguous_format)


def call_aligned(
    launcher: Callable[..., None],
    arguments: Sequence[Any],
    operands: Sequence[int],
    outputs: Sequence[int],
    written: Sequence[int] = (),
) -> bool:
    """Call a launcher with aligned copies where they are needed; return whether they were.

    Args:
        launcher: called with the changed arguments.
        arguments: of the launcher.
        operands: places of the operands, [..., d].
        outputs: places of the outputs [..., d], each perhaps None.
        written: places of what an earlier launch wrote, contiguous [..., d].
    """
    first = arguments[operands[0]]
    missing = padding(first.shape[-1])
    if not matters(first.device):
        return False
    if not missing and all(is_aligned(arguments[place]) for place in operands):
        return False
    changed = list(arguments)
    for place in (*operands, *written):
        changed[place] = aligned(arguments[place])
    if not missing:
        launcher(*changed)
        return True
    outputs = [place for place in outputs if arguments[place] is not None]
    for place in outputs:
        *size, width = arguments[place].shape
        changed[place] = arguments[place].new_empty(*size, width + missing)
    launcher(*changed)
    for place in outputs:
        arguments[place].copy_(changed[place][..., :-missing])
    return True
