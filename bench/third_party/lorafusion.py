"""LoRAFusion's ``fused_linear_lora``: Triton kernels that split the graph at s = drop(x) Aᵀ.

Read in commit c48d7fd (2025-09-17; no release): ``fused_linear_lora(x, linear_w, lora_a, lora_b,
alpha, seed, dropout_p, linear_bias)`` with x [batch, sequence, in], linear_w [out, in], lora_a
[rank, in], lora_b [out, rank], and alpha the whole scale. It knows the tiles of four GPUs; another
one of Hopper's takes those of the H100.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.lora.baselines import drop
from bench.lora.problem import Problem
from bench.method import Forward
from bench.third_party import LORAFUSION

TILED, H100 = "lorafusion.ops.triton_ops.config", "h100-80gb-hbm3"
MULTIPLE, LEAST_RANK = 256, 16


@contextlib.contextmanager
def _masked(module: Any, keep: Tensor | None) -> Iterator[None]:
    """Make its dropout apply ``keep``, for the gate; its own random stream is Triton's."""
    drawn = module.seeded_dropout

    def given(x: Tensor, p: float, seed: int, *, store_mask: bool) -> tuple[Tensor, Tensor | None]:
        return drop(x, p, keep), keep

    module.seeded_dropout = drawn if keep is None else given
    try:
        yield
    finally:
        module.seeded_dropout = drawn


def _tiles() -> str | None:
    """See to it that it has tiles for this GPU, or return why it has not."""
    configs = importlib.import_module(TILED).HARDWARE_CONFIGS
    name = importlib.import_module("lorafusion.utils.common").get_device_short_name()
    if name in configs:
        return None
    if torch.cuda.get_device_capability() != (9, 0):
        return f"has no tiles for {name}"
    configs[name] = configs[H100]
    return None


def _build(problem: Problem, keep: Tensor | None) -> Forward:
    module = LORAFUSION.load()
    each, p = problem, problem.case.dropout_p

    def forward() -> Tensor:
        with _masked(module, keep):
            y: Tensor = module.fused_linear_lora(
                each.x[None], each.weight, each.lora_a, each.lora_b, each.scale, dropout_p=p,
                linear_bias=each.bias,
            )  # fmt: skip
        return y[0]

    return forward


def _unsuited(problem: Problem) -> str | None:
    case = problem.case
    if not case.dropout_p:
        return "its backward needs dropout: it reads the shape of a mask that is None without"
    if case.rank < LEAST_RANK or case.rank & (case.rank - 1):
        return f"needs a rank that is a power of two, at least {LEAST_RANK}"
    if case.in_features % MULTIPLE or case.out_features % MULTIPLE:
        return f"needs features in multiples of {MULTIPLE}: some of its loads have no mask"
    return _tiles()


LORA = LORAFUSION.provider(_build, _unsuited)
