"""The token reduction in CUDA, all that the adapter asks of it: scaling, its gradient, groups."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from peft_kernels.core import rng
from peft_kernels.core.cuda_reduction import token_reduction
from peft_kernels.core.factors import Factor, Groups, Scaling
from tests.cuda_emulation import build
from tests.numerics import assert_as_accurate_as_eager

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
P, INVERSE_KEEP = 0.25, 4 / 3


@dataclass
class Given:
    v0: Tensor
    low0: Tensor
    v1: Tensor
    low1: Tensor
    weight: Tensor
    bias: Tensor
    seed: Tensor

    def sums(self, dtype: torch.dtype, rows: Tensor, dropped: int) -> tuple[Tensor, ...]:
        """Return g0, lowsum, g1 and colsum of some rows, unscaled."""
        masks = [torch.ones_like(v, dtype=torch.bool) for v in (self.v0, self.v1)]
        masks[dropped] = rng.dropout_mask(self.seed, *masks[dropped].shape, P)
        v0, v1 = (
            torch.where(mask, v, 0).to(dtype)[rows]
            for v, mask in zip((self.v0, self.v1), masks, strict=True)
        )
        low0, low1 = self.low0.to(dtype)[rows], self.low1.to(dtype)[rows]
        return v0.t() @ low0, low0.sum(0), v1.t() @ low1, v1.sum(0)


def given(tokens: int, columns0: int, columns1: int, rank: int, dtype: torch.dtype) -> Given:
    shapes = (
        (tokens, columns0), (tokens, rank), (tokens, columns1), (tokens, rank),
        (columns1, rank), (columns1,),
    )  # fmt: skip
    return Given(
        *(torch.randn(shape).to(dtype) for shape in shapes),
        seed=torch.tensor([2**61 + 5]),
    )


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("kind", ["number", "tensor", "column"])
@pytest.mark.parametrize(("tokens", "rank"), [(300, 70), (40, 5)], ids=["parts", "one-part"])
def test_scaling_and_its_gradient(
    device: build.Emulation, tokens: int, rank: int, kind: str, dropped: int, dtype: torch.dtype
) -> None:
    problem = given(tokens, 30, 67, rank, dtype)
    scale: Tensor | float = 0.7
    if kind != "number":
        scale = torch.rand(1 if kind == "tensor" else 67) + 0.5
    gradient = None if kind == "number" else nans(*scale.shape)  # type: ignore[union-attr]

    def run() -> list[Tensor]:
        outs = [nans(rank, 30), nans(rank), nans(67, rank), nans(67)]
        if gradient is not None:
            gradient.fill_(float("nan"))
        token_reduction(
            Factor(problem.v0, problem.low0, outs[0].t()),
            Factor(problem.v1, problem.low1, outs[2]),
            outs[3],
            seed=problem.seed,
            dropout_p=P,
            dropped=dropped,
            lowsum=outs[1],
            scaling=Scaling(scale, INVERSE_KEEP, gradient, problem.weight, problem.bias),
        )
        found = [outs[0].t(), *outs[1:]]
        return found if gradient is None else [*found, gradient.clone()]

    found = run()
    device.order(build.RANDOM, 5)
    again = run()
    device.order(build.ASCENDING)
    assert all(torch.equal(left, right) for left, right in zip(found, again, strict=True))

    def expected(kind_of: torch.dtype, rows: Tensor, columns: Tensor) -> list[Tensor]:
        g0, lowsum, g1, colsum = problem.sums(kind_of, rows, dropped)
        weight, bias = problem.weight.to(kind_of), problem.bias.to(kind_of)
        shares = ((weight * g1).sum(1) + bias * colsum) * INVERSE_KEEP
        factor = scale.to(kind_of) if isinstance(scale, Tensor) else scale
        factor = factor * INVERSE_KEEP
        scaled = g1 * (factor[:, None] if kind == "column" else factor)
        out = [g0, lowsum, scaled, colsum * factor]
        if kind == "column":
            out.append(shares)
        elif kind == "tensor":
            out.append(shares[columns].sum()[None])
        return out

    # Outputs are float32 here: the inputs' dtype rounds nothing.
    exact = expected(torch.float64, torch.arange(tokens), torch.arange(67))
    # In several orders: what one order makes of a single number is luck.
    eager = [expected(torch.float32, torch.randperm(tokens), torch.randperm(67)) for _ in range(5)]
    for name, *values in zip(
        ("g0", "lowsum", "g1", "colsum", "scale"), found, exact, *eager, strict=False
    ):
        assert_as_accurate_as_eager(name, values[0], values[2:], values[1], torch.float32)


@DTYPES
def test_groups_of_rows(ordered: build.Emulation, dtype: torch.dtype) -> None:
    """The second of four groups is empty, and the last one is of no 16 bytes' multiple."""
    problem = given(90, 30, 35, 5, dtype)
    order = torch.randperm(90)
    offsets = torch.tensor([0, 41, 41, 70, 90])
    g0, lowsum = nans(4, 5, 30, dtype=dtype), nans(4, 5, dtype=dtype)
    g1, colsum = nans(4, 35, 5, dtype=dtype), nans(4, 35, dtype=dtype)
    token_reduction(
        Factor(problem.v0, problem.low0, g0.transpose(1, 2)),
        Factor(problem.v1, problem.low1, g1),
        colsum,
        seed=problem.seed,
        dropout_p=P,
        dropped=1,
        lowsum=lowsum,
        groups=Groups(order, offsets, 4),
    )
    for group in range(4):
        rows = order[offsets[group] : offsets[group + 1]]
        exact = problem.sums(torch.float64, rows, 1)
        eager = problem.sums(dtype, rows, 1)
        found = (g0[group].t(), lowsum[group], g1[group], colsum[group])
        for name, value, same, right in zip(
            ("g0", "lowsum", "g1", "colsum"), found, eager, exact, strict=True
        ):
            if group == 1:
                assert not value.any(), name
            else:
                assert_as_accurate_as_eager(name, value, [same], right, dtype)


def test_what_is_not_wanted_is_left_out(device: build.Emulation) -> None:
    problem = given(300, 30, 67, 70, torch.float32)
    rows = torch.arange(300)
    exact = problem.sums(torch.float64, rows, 0)
    device.launched()
    for wanted in range(4):
        outs: list[Tensor | None] = [None] * 4
        shape = exact[wanted].shape
        outs[wanted] = nans(*shape)
        token_reduction(
            Factor(problem.v0, problem.low0, outs[0]),
            Factor(problem.v1, problem.low1, outs[2]),
            outs[3],
            seed=problem.seed,
            dropout_p=P,
            lowsum=outs[1],
        )
        torch.testing.assert_close(outs[wanted], exact[wanted].float(), rtol=1e-4, atol=1e-4)
    assert device.launched() == ["token_reduction_kernel"] * 4
    token_reduction(
        Factor(problem.v0, problem.low0, None),
        Factor(problem.v1, problem.low1, None),
        None,
        seed=None,
        dropout_p=0.0,
    )
    assert device.launched() == []
