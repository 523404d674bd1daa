"""peft's own LoRA layer, ``peft.tuners.lora.Linear``; read in 0.21.2.

The adapter's matrices have the dtype of the case: peft's default keeps them in float32 above a
bfloat16 base and casts x to it, which is another computation, and a slower one. "eager" in the
LoRA benchmark is this layer's arithmetic without its module.
"""

from __future__ import annotations

from torch import Tensor, nn

from bench.lora.baselines import drop
from bench.lora.problem import Problem
from bench.method import Forward
from bench.third_party import PEFT, give

ADAPTER = "default"
# Multiply-adds of the base layer. Above, a CPU's time is in the products, which are eager's, and a
# case takes seconds: what the module adds shows in the smaller ones.
LARGEST_ON_CPU = 2**33


class Masked(nn.Module):
    """Dropout by a given mask."""

    def __init__(self, p: float, keep: Tensor) -> None:
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x: Tensor) -> Tensor:
        """Return what is kept of x, scaled."""
        return drop(x, self.p, self.keep)


def _build(problem: Problem, keep: Tensor | None) -> Forward:
    from peft import LoraConfig

    case = problem.case
    base = nn.Linear(
        case.in_features, case.out_features, bias=problem.bias is not None, device="meta"
    )
    give(base, weight=problem.weight, bias=problem.bias)
    config = LoraConfig(
        r=case.rank, lora_alpha=problem.scale * case.rank, lora_dropout=case.dropout_p,
        init_lora_weights=False,
    )  # fmt: skip
    layer = PEFT.load().Linear(base, ADAPTER, config, r=case.rank, lora_alpha=config.lora_alpha)
    give(layer.lora_A[ADAPTER], weight=problem.lora_a)
    give(layer.lora_B[ADAPTER], weight=problem.lora_b)
    if keep is not None:
        layer.lora_dropout[ADAPTER] = Masked(case.dropout_p, keep)
    return lambda: layer(problem.x)


def _unsuited(problem: Problem) -> str | None:
    case = problem.case
    products = case.tokens * case.in_features * case.out_features
    if problem.dy.device.type == "cpu" and products > LARGEST_ON_CPU:
        return "its products are eager's: measured at smaller shapes on a CPU"
    return None


LORA = PEFT.provider(_build, _unsuited)
