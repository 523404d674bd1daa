"""How tests judge numbers: against float64, and never worse than eager PyTorch by much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 1.5
_T = TypeVar("_T")


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


def eager_forms(run: Callable[[], _T], device: torch.device) -> list[_T]:
    """Return what eager PyTorch gives, and where tf32 is allowed, also that of tf32 operands."""
    if not (device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"):
        return [run()]
    with RoundedToTF32():
        rounded = run()
    return [run(), rounded]


class RoundedToTF32(TorchDispatchMode):
    """Rounds the float32 operands of every product to tf32, in forward and in backward.

    What a library may do where tf32 is allowed. It need not: small products stay exact, and the
    error of such an eager form is no measure for what the setting allows.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "bmm"):
            args = tuple(map(_to_tf32, args))
        elif name in ("addmm", "baddbmm"):
            args = (args[0], *map(_to_tf32, args[1:]))
        return func(*args, **(kwargs or {}))


def _to_tf32(value: Tensor) -> Tensor:
    """Return float32 values rounded to 10 bits of mantissa, halves away from zero."""
    if value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
