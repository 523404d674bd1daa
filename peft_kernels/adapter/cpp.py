"""Launchers of the C++ CPU backend: one adapter or many in ``_C``, one pass per activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.core import extension
from peft_kernels.core.operands import as_served, pointer
from peft_kernels.core.rng import drop_threshold

# In the order of ``enum class Activation`` in csrc/cpu/activation.h.
ACTIVATIONS = (
    "identity", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid",
    "leaky_relu", "relu6", "mish",
)  # fmt: skip


def forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    scale: float | Tensor,
    activation: str,
    seed: Tensor | None,
    dropout_p: float,
    y: Tensor,
    pre: Tensor,
    index: Tensor | None = None,
) -> None:
    """Write y [M, D] and pre [M, r].

    With ``index`` [M] the parameters are those of E adapters, the adapter's number first; where it
    names none, y is the residual and pre is left as it is.
    """
    call = _call(x, down, up, up_bias, scale, activation, seed, dropout_p, pre, index)
    extension.load().adapter_forward(
        call, pointer(down_bias), pointer(residual),
        0 if residual is None else residual.stride(0), y.data_ptr(),
    )  # fmt: skip


def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: float | Tensor,
    activation: str,
    seed: Tensor | None,
    dropout_p: float,
    input_residual: bool,
    dx: Tensor | None,
    d_down: Tensor | None,
    d_up: Tensor | None,
    d_down_bias: Tensor | None,
    d_up_bias: Tensor | None,
    d_scale: Tensor | None,
    index: Tensor | None = None,
) -> None:
    """Write the gradients that are not None; d_scale is float32 of 1 or D elements, as scale is.

    With ``index`` [M] those of E adapters, the adapter's number first; ``d_scale`` must be None.
    """
    gradients = (d_down, d_up, d_down_bias, d_up_bias)
    served = [None if each is None else as_served(each) for each in gradients]
    call = _call(x, down, up, up_bias, scale, activation, seed, dropout_p, pre, index)
    extension.load().adapter_backward(
        call, dy.data_ptr(), dy.stride(0), input_residual, pointer(dx),
        *(part for each in served for part in (pointer(each), _is_bfloat16(each))),
        pointer(d_scale),
    )  # fmt: skip
    for gradient, written in zip(gradients, served, strict=True):
        if gradient is not None and written is not None and written is not gradient:
            gradient.copy_(written)


def _call(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    scale: float | Tensor,
    activation: str,
    seed: Tensor | None,
    dropout_p: float,
    pre: Tensor,
    index: Tensor | None,
) -> Any:
    channels = scale if isinstance(scale, Tensor) and scale.numel() > 1 else None
    return extension.load().AdapterCall(
        x.dtype == torch.bfloat16, *x.shape, down.shape[-2], x.data_ptr(), x.stride(0),
        down.data_ptr(), up.data_ptr(), pointer(up_bias),
        1.0 if channels is not None else float(scale), pointer(channels),
        ACTIVATIONS.index(activation), pointer(seed), drop_threshold(dropout_p),
        1.0 / (1.0 - dropout_p), pre.data_ptr(),
        pointer(index), down.shape[0],
    )  # fmt: skip


def _is_bfloat16(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16
