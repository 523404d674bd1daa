"""NVIDIA NeMo Automodel's Triton LoRA, as its ``TritonLinearLoRA`` calls it.

Read in 0.7.0 (PyPI): ``apply_memory_efficient_lora(x, lora_A, lora_B, scale, use_triton_kernel,
res)`` with x [tokens, in], lora_A [rank, in], lora_B [out, rank]; ``res``, the base layer's output,
is added in place. Its default position of dropout, "post", is another computation than peft's;
here it is "pre".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.lora.baselines import drop
from bench.lora.problem import Problem
from bench.method import Forward
from bench.third_party import NEMO

LARGEST_RANK = 128


def _build(problem: Problem, keep: Tensor | None) -> Forward:
    apply = NEMO.load().apply_memory_efficient_lora
    each, p = problem, problem.case.dropout_p

    def forward() -> Tensor:
        base = F.linear(each.x, each.weight, each.bias)
        dropped = drop(each.x, p, keep)
        y: Tensor = apply(dropped, each.lora_a, each.lora_b, each.scale, True, base)
        return y

    return forward


def _unsuited(problem: Problem) -> str | None:
    if problem.case.rank > LARGEST_RANK:
        # A tile is as wide as the rank: 4 stages of its least 128 x 256 are 256 KiB.
        return f"needs rank <= {LARGEST_RANK}: its tiles of larger ranks exceed shared memory"
    return None


LORA = NEMO.provider(_build, _unsuited)
