"""The named cases that are measured, and their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bench.method import CPU, DRY, GPU, HOST, MEMORY, SHORT, Case
from peft_kernels.core.rng import dropout_mask


@dataclass(frozen=True)
class AdapterCase(Case):
    """One adapter: x [tokens, features] through a bottleneck and back, residual x.

    Attributes:
        name: as in ``Case``, like suite and reported.
        dtype: of every tensor.
        bottleneck: r.
        activation: "relu" or "gelu".
        dropout_p: drop probability of the branch.
    """

    op: ClassVar[str] = "adapter"
    name: str
    suite: str
    tokens: int
    features: int
    bottleneck: int = 64
    activation: str = "relu"
    dropout_p: float = 0.0
    dtype: str = "bfloat16"
    reported: bool = False


def _case(
    suite: str, tokens: int, features: int, bottleneck: int, activation: str, p: float, dtype: str,
    reported: bool = False,
) -> AdapterCase:  # fmt: skip
    place = {HOST: "host ", MEMORY: "saved ", DRY: "dry "}.get(suite, "")
    name = (
        f"{place}adapter {tokens}x{features} r{bottleneck} {activation} {SHORT[dtype]} "
        f"p{p:g}".removesuffix(" p0")
    )
    return AdapterCase(name, suite, tokens, features, bottleneck, activation, p, dtype, reported)


_KINDS = (("relu", 0.0), ("gelu", 0.0), ("relu", 0.1))
_GPU_GRID = tuple(
    (features, bottleneck, p)
    for features in (768, 1024, 2048, 4096, 8192)
    for bottleneck in (16, 48, 64, 128)
    for p in (0.0, 0.1)
)
_REPORTED = {
    (768, 16, 0.0), (768, 64, 0.0), (2048, 64, 0.0), (2048, 64, 0.1), (4096, 64, 0.0),
    (4096, 128, 0.0), (8192, 16, 0.0), (8192, 128, 0.0),
}  # fmt: skip
CASES = (
    *(
        _case(CPU, 4096, features, 64, activation, p, dtype)
        for features in (768, 2048, 4096)
        for dtype in ("bfloat16", "float32")
        for activation, p in (_KINDS if features == 2048 else _KINDS[:1])
    ),
    _case(HOST, 1, 64, 8, "relu", 0.0, "float32"),
    *(
        _case(MEMORY, 4096, 2048, 128, activation, p, "bfloat16")
        for activation, p in (("relu", 0.0), ("gelu", 0.0), ("gelu", 0.1))
    ),
    *(
        _case(GPU, 16384, d, r, "relu", p, "bfloat16", (d, r, p) in _REPORTED)
        for d, r, p in _GPU_GRID
    ),
    # float32, because Triton's interpreter computes bfloat16 wrongly.
    _case(DRY, 40, 48, 8, "relu", 0.0, "float32", True),
    _case(DRY, 33, 40, 5, "gelu", 0.1, "float32", True),
)


def quick(case: AdapterCase) -> AdapterCase:
    """Return ``case`` cut to a size that proves the code runs and measures nothing."""
    return replace(
        case,
        name=f"quick {case.name}",
        tokens=min(case.tokens, 24),
        features=min(case.features, 40),
        bottleneck=min(case.bottleneck, 8),
    )


def input_bytes(case: AdapterCase) -> int:
    """Return the bytes of x."""
    return case.tokens * case.features * case.torch_dtype.itemsize


@dataclass(frozen=True)
class AdapterProblem:
    """The tensors of one case; x and all four parameters require gradients."""

    case: AdapterCase
    tensors: tuple[Tensor, ...]  # x [M, D], down [r, D], up [D, r], down_bias [r], up_bias [D]
    dy: Tensor  # [M, D]
    seed: Tensor  # int64 [1]
    scale: float = 1.0

    @property
    def alive(self) -> tuple[Tensor, ...]:
        """x, which the layer before or after holds, and the parameters."""
        return self.tensors

    def leaves(self, frozen: bool) -> dict[str, Tensor]:
        """Return what gradients are taken of."""
        names = ("x", "down", "up", "down_bias", "up_bias")
        return dict(zip(names, self.tensors, strict=True))

    def keep_mask(self) -> Tensor | None:
        """Return the dropout mask that ``seed`` stands for, bool [M, D]; None without dropout."""
        if self.case.dropout_p == 0.0:
            return None
        tokens, features = self.dy.shape
        return dropout_mask(self.seed, tokens, features, self.case.dropout_p)


def make_problem(case: AdapterCase, device: str | torch.device, seed: int = 0) -> AdapterProblem:
    """Return the tensors of ``case``, the same ones for the same seed; y is of order one."""
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens, features, bottleneck = case.tokens, case.features, case.bottleneck

    def random(*shape: int, fan: int = 1) -> Tensor:
        value = torch.randn(*shape, device=device, generator=generator) / math.sqrt(fan)
        return value.to(case.torch_dtype).requires_grad_()

    return AdapterProblem(
        case,
        (
            random(tokens, features),
            random(bottleneck, features, fan=features),
            random(features, bottleneck, fan=bottleneck),
            random(bottleneck),
            random(features),
        ),
        dy=random(tokens, features).detach(),
        seed=torch.randint(2**62, (1,), device=device, generator=generator),
    )
