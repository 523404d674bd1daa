"""How tests judge numbers: against float64, and never worse than eager PyTorch by much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 1.5


def assert_as_accurate_as_eager(
    name: str, actual: Tensor, eager: Sequence[Tensor], exact: Tensor, dtype: torch.dtype
) -> None:
    """Assert error(actual) <= 1.5 error(eager) + one rounding unit, worst element and mean square.

    Args:
        name: what is compared, for the message.
        actual: what the kernel gave.
        eager: what eager PyTorch gives in the same dtype, adding in one order or in several: in
            one alone the worst element is the luck of this machine's BLAS. The largest counts.
        exact: the float64 result.
        dtype: the dtype computed in; its rounding unit is granted.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape, f"{name}: {actual.shape} is not {exact.shape}"
    assert actual.isfinite().all(), f"{name}: not finite"
    # One dropped element may be zero; a whole tensor of zeros would prove nothing.
    assert exact.numel() <= 1 or exact.abs().max() > 0, f"{name}: all zeros"
    unit = torch.finfo(dtype).eps / 2
    if exact.numel() == 0:
        return
    difference = (actual.double() - exact).abs()
    eager_errors = [(each.double() - exact).abs() for each in eager]
    for norm in (lambda t: t.max(), lambda t: t.square().mean().sqrt()):
        allowed = max(norm(error) for error in eager_errors)
        limit = FACTOR * allowed + unit * norm(exact.abs())
        assert norm(difference) <= limit, (
            f"{name}: error {norm(difference):.3e} > {limit:.3e} "
            f"(eager's is {allowed:.3e}, the result's size {norm(exact.abs()):.3e})"
        )
