"""Launchers of the C++ CPU backend: the low-rank part in ``_C``, x Wᵀ by the GEMM library.

The GEMM makes its product first and ``_C`` adds ``bias + s Bᵀ`` (in backward ``mask * (ds A)``) in
place: a GEMM that adds to what is there (beta = 1) was measured to cost more than this pass.
Products too small for a GEMM call are made in ``_C`` altogether.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_kernels.core import extension
from peft_kernels.core.operands import as_served, pointer
from peft_kernels.core.rng import drop_threshold

# Multiply-adds, and rows, up to which calling the GEMM library costs more than the product.
_SMALL_PRODUCT, _FEW_ROWS = 1 << 15, 64


@functools.lru_cache(maxsize=4096)
def _is_small(tokens: int, in_features: int, out_features: int, rank: int) -> bool:
    work = in_features * out_features + rank * (in_features + out_features)
    return tokens <= _FEW_ROWS and tokens * work <= _SMALL_PRODUCT


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
    (tokens, in_features), (out_features, rank) = x.shape, lora_b.shape
    small = _is_small(tokens, in_features, out_features, rank) and weight.is_contiguous()
    if not small:
        torch.mm(x, weight.t(), out=y)
    extension.load().lora_forward(
        x.dtype is torch.bfloat16, tokens, in_features, out_features, rank,
        x.data_ptr(), x.stride()[0], lora_a.data_ptr(), lora_b.data_ptr(),
        0 if bias is None else bias.data_ptr(), weight.data_ptr() if small else 0,
        float(scale) / (1.0 - dropout_p), 0 if seed is None else seed.data_ptr(),
        0 if seed is None else drop_threshold(dropout_p), y.data_ptr(), s.data_ptr(),
    )  # fmt: skip


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
    half = torch.bfloat16
    (tokens, in_features), (out_features, rank) = x.shape, lora_b.shape
    small = _is_small(tokens, in_features, out_features, rank) and weight.is_contiguous()
    if dx is not None and not small:
        torch.mm(dy, weight, out=dx)
    a, b, c = wanted = [None if g is None else as_served(g) for g in (da, db, dbias)]
    extension.load().lora_backward(
        x.dtype == half, tokens, in_features, out_features, rank,
        dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), s.data_ptr(),
        lora_a.data_ptr(), lora_b.data_ptr(), weight.data_ptr() if small else 0,
        float(scale) / (1.0 - dropout_p), pointer(seed), drop_threshold(dropout_p), pointer(dx),
        pointer(a), a is not None and a.dtype == half,
        pointer(b), b is not None and b.dtype == half,
        pointer(c), c is not None and c.dtype == half,
    )  # fmt: skip
    for gradient, served in zip((da, db, dbias), wanted, strict=True):
        if gradient is not None and served is not None and served is not gradient:
            gradient.copy_(served)
    if dweight is not None:
        torch.mm(dy.t(), x, out=dweight)
