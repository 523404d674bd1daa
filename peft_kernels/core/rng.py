"""Dropout by Philox-4x32-10, stored as nothing but a seed.

The mask is a pure function of (seed, row, column), so every backend regenerates the same bits in
forward and in backward. This file is its specification in plain PyTorch; ``core/device.py`` is the
same function for Triton and ``csrc/cpu/philox.h`` for C++.

Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
# Counters drawn at a time: bounds the int64 temporaries of the PyTorch form to some tens of MiB.
_CHUNK = 1 << 20


class Drawing(threading.local):
    """What becomes of a seed that was drawn, in this thread.

    Tensor-parallel layers make it the same on every rank, or another one on each.
    """

    rule: Callable[[Tensor], Tensor] | None = None


DRAWING = Drawing()


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """Return fresh dropout seeds, int64 [count], from torch's generator of ``device``.

    Drawn on the device, so that ``torch.manual_seed``, checkpoint recomputation and CUDA graph
    replays give what they give for ``torch.nn.Dropout``, and nothing synchronises.
    """
    seed = torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)
    return seed if DRAWING.rule is None else DRAWING.rule(seed)


def drop_threshold(p: float) -> int:
    """Return the uint32 bound of probability ``p``: an element is kept iff its word reaches it."""
    if p == 0.0:
        return 0
    return min(round(p * 2**32), _LOW)


def philox_words(seed: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of each 64-bit counter, as int64 in [0, 2**32).

    Args:
        seed: int64 [1]; its two halves are the key.
        counters: int64, any shape; low and high half are the first two counter words.
    """
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counters & _LOW, (counters >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counters)
    for _ in range(ROUNDS):
        # The 64-bit products wrap in int64; the masked shifts read them as unsigned.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ key0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ key1,
            p0 & _LOW,
        )
        key0, key1 = (key0 + _W0) & _LOW, (key1 + _W1) & _LOW
    return c0, c1, c2, c3


def dropout_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """Return the keep mask, bool [rows, cols], of dropout with probability ``p``.

    Element (row, k) takes word ``k % 4`` of counter ``row * ceil(cols / 4) + k // 4``.

    Args:
        seed: int64 tensor of one element; the mask is made on its device.
        rows: number of rows (tokens).
        cols: number of columns (features).
        p: drop probability in [0, 1).
    """
    groups = -(-cols // 4)
    threshold = drop_threshold(p)
    mask = torch.empty(rows, cols, dtype=torch.bool, device=seed.device)
    step = max(1, _CHUNK // max(1, groups))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        counters = torch.arange(start * groups, stop * groups, device=seed.device)
        words = torch.stack(philox_words(seed.reshape(1), counters), dim=-1)
        mask[start:stop] = (words >= threshold).reshape(stop - start, groups * 4)[:, :cols]
    return mask
