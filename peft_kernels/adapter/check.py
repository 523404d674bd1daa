"""Argument checks of the adapter, with one adapter or with many."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_kernels.core import checks


def check_scale(value: object, features: int, device: torch.device) -> float | Tensor:
    """Return ``value`` checked as a scale: a number, or a tensor of no dimension or of [D].

    Raises:
        TypeError: neither a number nor a floating-point tensor.
        ValueError: another shape or device, or not finite.
    """
    if isinstance(value, Tensor):
        checks.check_tensor("scale", value)
        # One element in one dimension is how nn.Parameter(torch.ones(1)) is often written.
        if value.shape not in ((), (1,), (features,)):
            raise ValueError(
                f"scale must be a number, a 0-d tensor or a tensor of shape [{features}], one "
                f"number for each feature, got shape {list(value.shape)}"
            )
        checks.check_same_device({"scale": value}, device)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"scale must be a number, a 0-d tensor or a tensor of shape [{features}], got "
            f"{checks.describe(value)}"
        )
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")
    return float(value)


def check_residual(value: object, x: Tensor) -> Tensor | None:
    """Return the residual where it is a tensor of its own, None for "input" and for none.

    Raises:
        TypeError: not "input", a tensor or None.
        ValueError: another word, or another shape than x.
    """
    if value is None or (isinstance(value, str) and value == "input"):
        return None
    if not isinstance(value, Tensor):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(
            f'residual must be "input" (x itself), a tensor of the shape of x or None, got '
            f"{checks.describe(value)}"
        )
    checks.check_tensor("residual", value)
    if value.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {list(x.shape)}, got {list(value.shape)}"
        )
    return value


def check_weights(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    *,
    grouped: bool = False,
) -> bool:
    """Check x and the parameters of one adapter, or of E of them where ``grouped``.

    Returns whether all are plain tensors of one dtype on one device, see ``checks.uniform``.
    """
    # Of these the biases alone may be None.
    missing = down_weight is None or up_weight is None
    plain = not missing and checks.uniform(x, down_weight, up_weight, down_bias, up_bias)
    if not plain:
        checks.check_tensor("x", x)
        checks.check_tensor("down_weight", down_weight)
        checks.check_tensor("up_weight", up_weight)
    shape, down_shape, up_shape = x.shape, down_weight.shape, up_weight.shape
    if not shape:
        raise ValueError("x must have shape [..., D], got a 0-d tensor")
    if not len(down_shape) == len(up_shape) == 2 + grouped:
        lead = "E, " if grouped else ""
        checks.check_ndim("down_weight", down_weight, 2 + grouped, f"[{lead}r, D]")
        checks.check_ndim("up_weight", up_weight, 2 + grouped, f"[{lead}D, r]")
    *count, bottleneck, features = down_shape
    if shape[-1] != features:
        raise ValueError(
            f"x must have shape [..., {features}] to fit down_weight {list(down_shape)}, "
            f"got {list(shape)}"
        )
    if 0 in (bottleneck, features):
        raise ValueError(
            f"down_weight must have at least one row and one column, got {list(down_shape)}"
        )
    if up_shape != (*count, features, bottleneck):
        raise ValueError(
            f"up_weight must have shape {[*count, features, bottleneck]} to fit down_weight "
            f"{list(down_shape)}, got {list(up_shape)}"
        )
    for name, bias, size in (
        ("down_bias", down_bias, bottleneck),
        ("up_bias", up_bias, features),
    ):
        if bias is not None:
            if not plain:
                checks.check_tensor(name, bias)
            if bias.shape != (*count, size):
                raise ValueError(f"{name} must have shape {[*count, size]}, got {list(bias.shape)}")
    return plain


def check_index(index: Tensor, adapters: int) -> None:
    """Raise ValueError naming a number that is no adapter's and not -1; CPU tensors only."""
    low, high = (int(bound) for bound in index.aminmax())
    if low < -1 or high >= adapters:
        raise ValueError(
            f"index must lie from -1 (no adapter) to {adapters - 1} for {adapters} adapters, "
            f"got {low if low < -1 else high}"
        )


def check_dtypes(x: Tensor, residual: Tensor | None, **parameters: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in, after checking devices and which dtypes may mix."""
    named = {**parameters, "residual": residual}
    checks.check_same_device(named, x.device)
    return checks.compute_dtype(x, named, exact=("residual",))
