"""Tensors brought into the form that every launcher takes: 2-D, one dtype, a unit stride."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and scales for a dtype computed in: float32, or float64's own."""
    return torch.promote_types(dtype, torch.float32)


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as [M, K] in ``dtype`` with unit inner stride: a view wherever that is possible."""
    if x.dtype is not dtype:
        x = x.to(dtype)
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride()[1] == 1 else x.contiguous()


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``weight`` in ``dtype`` with a unit stride in one of its two dimensions."""
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    return weight if 1 in weight.stride() else weight.contiguous()


def packed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``value`` contiguous in ``dtype``."""
    if value.dtype is not dtype:
        value = value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def factors(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W by ``matrix`` and A and B by ``packed``, in one call: three cost a small product."""
    if weight.dtype is not dtype or not weight.is_contiguous():
        weight = matrix(weight, dtype)
    if lora_a.dtype is not dtype or not lora_a.is_contiguous():
        lora_a = packed(lora_a, dtype)
    if lora_b.dtype is not dtype or not lora_b.is_contiguous():
        lora_b = packed(lora_b, dtype)
    return weight, lora_a, lora_b


def as_rows(gradient: Tensor | None) -> Tensor | None:
    """Return a packed output as a view of two dimensions."""
    if gradient is None or gradient.dim() == 2:
        return gradient
    return gradient.view(-1, gradient.shape[-1])


def narrow(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``gradient``, or a fresh output of the dtype computed in where that is another."""
    if gradient is None or gradient.dtype == dtype:
        return gradient
    return torch.empty_like(gradient, dtype=dtype)


def widen(computed: Tensor | None, gradient: Tensor | None) -> None:
    """Copy what ``narrow`` returned into ``gradient`` where the two differ."""
    if computed is not None and gradient is not None and computed is not gradient:
        gradient.copy_(computed)


def gradient_of(value: Tensor) -> Tensor:
    """Return an output for the gradient of ``value``: packed, whatever the strides of ``value``."""
    # empty_like is the faster call where it gives that.
    return torch.empty_like(value) if value.is_contiguous() else value.new_empty(value.shape)


def arrived(gradient: Tensor) -> Tensor:
    """Return a gradient whose data is there.

    torch's parallel layers hand back the wrapped result of a collective that is still under way,
    and a kernel would read the wrapper's address.
    """
    # Exact type first: this line is all that the common case pays.
    if type(gradient) is Tensor or type(gradient).__name__ != "AsyncCollectiveTensor":
        return gradient
    return gradient.wait()  # type: ignore[attr-defined]


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's data for compiled code, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def as_served(gradient: Tensor) -> Tensor:
    """Return a gradient that ``_C`` can write: a fresh float32 one for float64 and float16."""
    if gradient.dtype in (torch.float32, torch.bfloat16):
        return gradient
    return torch.empty_like(gradient, dtype=torch.float32)
