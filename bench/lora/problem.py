"""The tensors of one case: random, scaled so that an error in the low-rank part cannot hide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lora.cases import LoRACase
from peft_kernels.core.rng import dropout_mask


@dataclass(frozen=True)
class Problem:
    """What every provider of a case is given.

    ``x``, ``lora_a`` and ``lora_b`` require gradients, the base weight and bias are frozen.
    """

    case: LoRACase
    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    dy: Tensor  # [M, N]
    seed: Tensor  # int64 [1]
    scale: float

    @property
    def alive(self) -> tuple[Tensor, ...]:
        """x, which the layer before or after holds, and the parameters."""
        values = (self.x, self.weight, self.bias, self.lora_a, self.lora_b)
        return tuple(value for value in values if value is not None)

    def leaves(self, frozen: bool) -> dict[str, Tensor]:
        """Return what gradients are taken of: in a frozen layer, x alone."""
        return {"x": self.x} if frozen else {"x": self.x, "a": self.lora_a, "b": self.lora_b}

    def keep_mask(self) -> Tensor | None:
        """Return the dropout mask that ``seed`` stands for, bool [M, K]; None without dropout."""
        if self.case.dropout_p == 0.0:
            return None
        m, k = self.x.shape
        return dropout_mask(self.seed, m, k, self.case.dropout_p)


def make_problem(case: LoRACase, device: str | torch.device, seed: int = 0) -> Problem:
    """Return the tensors of ``case`` on ``device``, the same ones for the same ``seed``.

    Base and low-rank part both have entries of order one: with the paper's B = 0, or with the small
    B of a trained adapter, a wrong low-rank part would vanish in the rounding of the base product.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank

    def random(*shape: int, deviation: float, trained: bool = False) -> Tensor:
        value = torch.randn(*shape, device=device, generator=generator) * deviation
        return value.to(case.torch_dtype).requires_grad_(trained)

    return Problem(
        case,
        x=random(m, k, deviation=1.0, trained=True),
        weight=random(n, k, deviation=1 / math.sqrt(k)),
        bias=random(n, deviation=1.0) if case.bias else None,
        lora_a=random(r, k, deviation=1 / math.sqrt(k), trained=True),
        lora_b=random(n, r, deviation=1 / math.sqrt(r), trained=True),
        dy=random(m, n, deviation=1.0),
        seed=torch.randint(2**62, (1,), device=device, generator=generator),
        scale=2.0,
    )
