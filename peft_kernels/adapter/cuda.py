"""Launchers of the CUDA backend: the adapter kernels of csrc/cuda/adapter_kernel.h.

Forward is one launch, backward two, dpre and dx, then the gradients of the parameters: as in Triton
(``launch.py``), for one adapter and for many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.adapter import activations
from peft_kernels.adapter.grouping import Grouping
from peft_kernels.core import cuda_library, triton_runtime
from peft_kernels.core.cuda_reduction import token_reduction
from peft_kernels.core.factors import Factor, Groups, Scaling
from peft_kernels.core.rng import drop_threshold

# Rows of a tile in csrc/cuda/adapter_kernel.h.
_SMALL, _LARGE = 16, 64


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
    tile_rows, grouping = _tiles(x, down, index)
    cuda_library.call(
        "adapter_forward",
        x, down, up, down_bias, up_bias, residual,
        *_common(scale, activation, seed, dropout_p, grouping), tile_rows,
        y, pre, torch.empty_like(pre),
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
    tile_rows, grouping = _tiles(x, down, index)
    need_dpre = dx is not None or d_down is not None or d_down_bias is not None
    need_hidden = d_up is not None or d_scale is not None
    dpre = torch.empty_like(pre) if need_dpre else None
    hidden = torch.empty_like(pre) if need_hidden else None
    if need_dpre or need_hidden:
        cuda_library.call(
            "adapter_backward",
            dy, pre, down, up, *_common(scale, activation, seed, dropout_p, grouping), tile_rows,
            input_residual, dpre, hidden, dx,
        )  # fmt: skip
    token_reduction(
        Factor(
            x,
            pre if dpre is None else dpre,
            None if d_down is None else d_down.transpose(-1, -2),
        ),
        Factor(dy, pre if hidden is None else hidden, d_up),
        d_up_bias,
        seed=seed,
        dropout_p=dropout_p,
        dropped=1,
        lowsum=d_down_bias,
        scaling=Scaling(scale, 1.0 / (1.0 - dropout_p), d_scale, up, up_bias),
        # Rows without an adapter have no gradients.
        groups=None
        if grouping is None
        else Groups(grouping.order, grouping.offsets[1:], down.shape[0]),
    )


def _tiles(x: Tensor, down: Tensor, index: Tensor | None) -> tuple[int, Grouping | None]:
    """Return the rows of a tile, and the rows sorted by adapter where there are many adapters.

    Large tiles read the weights less often, small ones keep more of the GPU at work.
    """
    multiprocessors = 2
    if x.device.type == "cuda":
        multiprocessors = triton_runtime.multiprocessors(x.device.index or 0)
    most = max(multiprocessors, 0 if index is None else down.shape[0])
    tile_rows = _LARGE if x.shape[0] > _LARGE * (most - 1) else _SMALL
    return tile_rows, None if index is None else Grouping.of(index, down.shape[0], tile_rows)


def _common(
    scale: float | Tensor,
    activation: str,
    seed: Tensor | None,
    dropout_p: float,
    grouping: Grouping | None,
) -> tuple[Any, ...]:
    """Return the arguments that both ops take, in their order."""
    return (
        scale if isinstance(scale, Tensor) else None,
        1.0 if isinstance(scale, Tensor) else scale,
        1.0 / (1.0 - dropout_p),
        activations.NAMES.index(activation),
        seed,
        drop_threshold(dropout_p),
        grouping and grouping.order,
        grouping and grouping.offsets,
        grouping and grouping.tiles,
    )
