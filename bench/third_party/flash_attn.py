"""flash-attn on the prefix concatenated with the keys: causal is bottom-right, so all see it.

Read in flash-attn 2.8.4, commit 0251105 (2026-08-15): ``flash_attn_func(q, k, v, ..., causal=)``
with q [batch, sequence, heads, size] and k, v of fewer heads; before 2.1 causal was top-left.
``flash_attn_interface.flash_attn_func`` of ``hopper/``, version 3, takes the same of these, and in
older builds returned the log-sum-exp beside the output.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.method import Forward, first
from bench.third_party import FLASH_ATTN, FLASH_ATTN_3, Peer

if TYPE_CHECKING:
    from bench.prefix import PrefixProblem

Build = Callable[["PrefixProblem", Tensor | None], Forward]


def whole(prefix: Tensor, own: Tensor) -> Tensor:
    """Return prefix [heads, P, d] before own [B, heads, S, d], as [B, P + S, heads, d]."""
    before = prefix.transpose(0, 1).expand(own.shape[0], -1, -1, -1)
    return torch.cat((before, own.transpose(1, 2)), dim=1)


def _build(peer: Peer) -> Build:
    def build(problem: PrefixProblem, keep: Tensor | None) -> Forward:
        attend = peer.load().flash_attn_func
        q, k, v, prefix_k, prefix_v = problem.tensors

        def forward() -> Tensor:
            keys, values = whole(prefix_k, k), whole(prefix_v, v)
            y = first(attend(q.transpose(1, 2), keys, values, causal=True))
            return y.transpose(1, 2)

        return forward

    return build


def _unsuited(problem: PrefixProblem) -> str | None:
    case = problem.case
    if case.dtype not in ("float16", "bfloat16"):
        return "needs float16 or bfloat16"
    if case.head_size > 256 or case.head_size % 8:
        return "needs heads of at most 256, in multiples of 8"
    return None


def _too_old(problem: PrefixProblem) -> str | None:
    numbers = [int(number) for number in re.findall(r"\d+", FLASH_ATTN.version or "")[:2]]
    if numbers and numbers < [2, 1]:
        return f"needs version 2.1: {FLASH_ATTN.version} aligns causal to the top left"
    return _unsuited(problem)


PREFIX = FLASH_ATTN.provider(_build(FLASH_ATTN), _too_old)
PREFIX_3 = FLASH_ATTN_3.provider(_build(FLASH_ATTN_3), _unsuited)
