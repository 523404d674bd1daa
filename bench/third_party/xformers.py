"""xFormers: prefix and sequence as two attentions, merged by their log-sum-exps.

Read in 0.0.35, commit ca6d2aa0 (2026-04-21), which re-exports MSLK's, commit 2a3c897 (2026-08-21):
``memory_efficient_attention_partial_autograd(query, key, value, attn_bias)`` with [batch, sequence,
heads, size] of equally many heads, and ``merge_attentions_autograd(*partials)``.
To the prefix all queries of a key's head are one long sequence, so that it is neither copied for
each sequence nor repeated for each head; keys and values of the sequence are repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bench.method import Forward
from bench.third_party import XFORMERS

if TYPE_CHECKING:
    from bench.prefix import PrefixProblem


def _build(problem: PrefixProblem, keep: Tensor | None) -> Forward:
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    module = XFORMERS.load()
    partial = module.memory_efficient_attention_partial_autograd
    q, k, v, prefix_k, prefix_v = problem.tensors
    case = problem.case
    group = case.heads // case.kv_heads
    causal = LowerTriangularFromBottomRightMask()

    def repeated(own: Tensor) -> Tensor:
        rows = own.transpose(1, 2)[:, :, :, None]  # [B, S, kv_heads, 1, d]
        return rows.expand(-1, -1, -1, group, -1).flatten(2, 3)

    def of_heads(folded: Tensor) -> Tensor:
        """Return [1, B * queries * group, kv_heads, n] as [B, queries, heads, n]."""
        rows = folded.unflatten(1, (case.batch, case.queries, group))[0]
        return rows.transpose(2, 3).flatten(2, 3)

    def forward() -> Tensor:
        grouped = q.unflatten(1, (case.kv_heads, group))  # [B, kv_heads, group, queries, d]
        folded = grouped.permute(0, 3, 2, 1, 4).reshape(1, -1, case.kv_heads, case.head_size)
        shared = (each.transpose(0, 1)[None] for each in (prefix_k, prefix_v))
        before = partial(folded, *shared).apply(of_heads)
        own = partial(q.transpose(1, 2), repeated(k), repeated(v), causal)
        y: Tensor = module.merge_attentions_autograd(before, own)
        return y.to(q.dtype).transpose(1, 2)

    return forward


def _unsuited(problem: PrefixProblem) -> str | None:
    case = problem.case
    if case.dtype not in ("float16", "bfloat16"):
        return "needs float16 or bfloat16: its other kernels give no partial attention"
    if case.head_size > 256 or case.head_size % 8:
        return "needs heads of at most 256, in multiples of 8"
    return None


PREFIX = XFORMERS.provider(_build, _unsuited)
