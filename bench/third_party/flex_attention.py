"""FlexAttention on the prefix concatenated with the keys, under a block mask that spares it.

Read in torch 2.13: ``flex_attention(query, key, value, ..., block_mask=, enable_gqa=)`` with
[batch, heads, sequence, size], compiled, as it is meant to be: otherwise all scores are written.
The block mask is made beforehand: a model makes it once for all layers. On a CPU the compiled form
has no backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.method import Forward
from bench.third_party import FLEX

if TYPE_CHECKING:
    from bench.prefix import PrefixCase, PrefixProblem


def seen(length: int, shift: int) -> Callable[..., Tensor]:
    """Return which keys a query sees: all ``length`` of the prefix, and those not after it.

    Args:
        length: of the prefix; its keys come first, so that none is after any query.
        shift: how many of the sequence's keys come before the first query.
    """

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + length + shift

    return mask_mod


def attend(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, block_mask: Any
) -> Tensor:
    """Return attention to prefix and keys."""
    from torch.nn.attention.flex_attention import flex_attention

    batch, heads = q.shape[:2]
    keys, values = (
        torch.cat((prefix.expand(batch, -1, -1, -1), own), dim=2)
        for prefix, own in ((prefix_k, k), (prefix_v, v))
    )
    y: Tensor = flex_attention(
        q, keys, values, block_mask=block_mask, enable_gqa=heads != k.shape[1]
    )
    return y


@functools.lru_cache(maxsize=1)
def _prepared(case: PrefixCase, device: torch.device) -> tuple[Callable[..., Tensor], Any]:
    """Return the compiled function of a case and its mask: it is compiled once, not per build."""
    torch._dynamo.reset()
    mask = FLEX.load().create_block_mask(
        seen(case.length, case.tokens - case.queries), None, None, case.queries,
        case.length + case.tokens, device=device,
    )  # fmt: skip
    return torch.compile(attend, dynamic=False), mask


def _build(problem: PrefixProblem, keep: Tensor | None) -> Forward:
    compiled, mask = _prepared(problem.case, problem.dy.device)
    return lambda: compiled(*problem.tensors, mask)


PREFIX = FLEX.provider(_build, poison=False)
