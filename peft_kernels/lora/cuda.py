"""Launchers of the CUDA backend: the LoRA kernels of csrc/cuda/lora_kernel.h.

Forward is one launch, backward two, dS and dX, then dA, dB and dbias: as in Triton (``launch.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.core import cuda_library, triton_runtime
from peft_kernels.core.cuda_reduction import token_reduction
from peft_kernels.core.factors import Factor
from peft_kernels.core.rng import drop_threshold

# The fewest rows of a tile in csrc/cuda/lora_kernel.h: as many flags may be needed.
_TILE_ROWS = 64


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float | Tensor,
    dropout_p: float,
    y: Tensor,
    s: Tensor,
) -> None:
    """Write y [M, N] and s [M, r]."""
    _product(x, weight, lora_a, lora_b, bias, seed, scale, dropout_p, False, y, s)


def backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor | None,
    scale: float | Tensor,
    dropout_p: float,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dbias: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Write the gradients that are not None."""
    ds = s
    if dx is not None or da is not None:
        ds = torch.empty_like(s)
        _product(dy, weight.t(), lora_b.t(), lora_a.t(), None, seed, scale, dropout_p, True, dx, ds)
    token_reduction(
        Factor(x, ds, None if da is None else da.t()),
        Factor(dy, s, db),
        dbias,
        seed=seed,
        dropout_p=dropout_p,
    )
    if dweight is not None:
        torch.mm(dy.t(), x, out=dweight)


def _product(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float | Tensor,
    dropout_p: float,
    drops_output: bool,
    y: Tensor | None,
    s: Tensor,
) -> None:
    """Write y = x wᵀ + bias + keep * (s bᵀ) with s = c · (keep * x) aᵀ; without y, s alone."""
    device = x.device
    along = w.stride(1) == 1 or w.shape[1] == 1
    multiprocessors = 2
    if device.type == "cuda":
        multiprocessors = triton_runtime.multiprocessors(device.index or 0)
    cuda_library.call(
        "lora_product",
        x, w, _laid_out(a, along), _laid_out(b, along), bias,
        scale if isinstance(scale, Tensor) else None,
        1.0 if isinstance(scale, Tensor) else scale,
        1.0 / (1.0 - dropout_p), seed, drop_threshold(dropout_p), drops_output, multiprocessors,
        y, s, triton_runtime.counters(device, 2 - (-x.shape[0] // _TILE_ROWS)),
    )  # fmt: skip


def _laid_out(factor: Tensor, along: bool) -> Tensor:
    """Return a small factor with its unit stride where the weight has its own."""
    if along:
        return factor if factor.stride(1) == 1 else factor.contiguous()
    return factor if factor.stride(0) == 1 else factor.t().contiguous().t()
