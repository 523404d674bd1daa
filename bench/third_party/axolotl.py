"""axolotl's ``LoRA_O``: three library GEMMs in one autograd function, for any linear layer.

Read in 0.19.0 (PyPI) and commit 067b021c8 (2026-07-24), where it is the same:
``LoRA_O.apply(X, X_drop, W, b, W_quant, A, B, s, lora_bias, magnitude)`` with X [batch, sequence,
in], W [out, in], A [rank, in], B [out, rank]. As axolotl does, dropout is drawn outside, and
X_drop is None without it. It never returns the gradient of b, which is frozen here.
"""

from __future__ import annotations

from torch import Tensor

from bench.lora.baselines import drop
from bench.lora.problem import Problem
from bench.method import Forward
from bench.third_party import AXOLOTL


def _build(problem: Problem, keep: Tensor | None) -> Forward:
    apply = AXOLOTL.load().LoRA_O.apply
    each, p = problem, problem.case.dropout_p

    def forward() -> Tensor:
        x = each.x[None]
        dropped = drop(each.x, p, keep)[None] if p else None
        y: Tensor = apply(
            x, dropped, each.weight, each.bias, None, each.lora_a, each.lora_b, each.scale, None,
            None,
        )  # fmt: skip
        return y[0]

    return forward


LORA = AXOLOTL.provider(_build)
