"""How tests judge numbers: against float64, and never worse than eager PyTorch by much."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.5


def assert_as_accurate_as_eager(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype
) -> None:
    """Assert error(actual) <= 1.5 error(eager) + one rounding unit, worst element and mean square.

    Args:
        name: what is compared, for the message.
        actual: what the kernel gave.
        eager: what eager PyTorch gives in the same dtype.
        exact: the float64 result.
        dtype: the dtype computed in; its rounding unit is granted.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape, f"{name}: {actual.shape} is not {exact.shape}"
    assert actual.isfinite().all(), f"{name}: not finite"
    # One dropped element may be zero; a whole tensor of zeros would prove nothing.
    assert exact.numel() <= 1 or exact.abs().max() > 0, f"{name}: all zeros"
    unit = torch.finfo(dtype).eps / 2
    difference, allowed = (actual.double() - exact).abs(), (eager.double() - exact).abs()
    if exact.numel() == 0:
        return
    for norm in (lambda t: t.max(), lambda t: t.square().mean().sqrt()):
        limit = FACTOR * norm(allowed) + unit * norm(exact.abs())
        assert norm(difference) <= limit, (
            f"{name}: error {norm(difference):.3e} > {limit:.3e} "
            f"(eager's is {norm(allowed):.3e}, the result's size {norm(exact.abs()):.3e})"
        )
