"""``drop``: dropout of the rows that a kernel drops again by the same seed, alone.

Where a dropped x is an operand of a library's product it has to lie in memory; its mask does not:
backward draws it anew. ``mask`` and p as in ``core/rng.py``:

    y = mask * x / (1 - p)          dx = mask * dy / (1 - p)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.core import extension, rng, triton_runtime
from peft_kernels.core.library import once_differentiable, out_variant_op
from peft_kernels.core.operands import rows


def run_drop(x: Tensor, seed: Tensor, dropout_p: float, y: Tensor) -> None:
    """Write y, packed, of the shape and dtype of x [..., K]."""
    if not x.numel():
        return
    flat = rows(x, x.dtype)
    if x.is_cuda and triton_runtime.why_not(x.device, x.dtype) is None:
        from peft_kernels.lora import drop_kernels

        drop_kernels.drop(flat, seed, dropout_p, y.view(flat.shape))
        return
    if not x.is_cuda and extension.why_not_products(x.dtype) is None:
        extension.load().drop(
            x.dtype == torch.bfloat16, flat.shape[0], flat.shape[1], flat.data_ptr(),
            flat.stride(0), 1.0 / (1.0 - dropout_p), seed.data_ptr(),
            rng.drop_threshold(dropout_p), y.data_ptr(),
        )  # fmt: skip
        return
    mask = rng.dropout_mask(seed, flat.shape[0], flat.shape[1], dropout_p)
    torch.where(mask, flat, flat.new_zeros(()), out=y.view(flat.shape))
    y *= 1.0 / (1.0 - dropout_p)


_drop = out_variant_op(
    "drop", run_drop, "(Tensor x, Tensor seed, float dropout_p, Tensor(a!) y) -> ()", ("y",)
)


class DropFunction(torch.autograd.Function):
    """Dropout by a seed, which is all that is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
        """Return y, packed."""
        y = x.new_empty(x.shape)
        _drop(x, seed, dropout_p, y)
        ctx.save_for_backward(seed)
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return dx."""
        if dy is None:
            return None, None, None
        (seed,) = ctx.saved_tensors
        dx = dy.new_empty(dy.shape)
        _drop(dy, seed, ctx.dropout_p, dx)
        return dx, None, None


def drop(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Return x [..., K] with dropout, by the mask that ``lora_linear`` draws from ``seed``."""
    return DropFunction.apply(x, seed, dropout_p)
