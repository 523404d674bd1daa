"""The Triton kernel of ``dropout.drop``, and its launcher.

    y = keep * x / (1 - p)                        x, y [M, K]

A program reads and writes one tile, once; the mask is drawn in registers and stored nowhere. Grid
(⌈M / BLOCK_M⌉, ⌈K / BLOCK_K⌉).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.core.device import keep_mask
from peft_kernels.core.launches import launch, remembered
from peft_kernels.core.rng import drop_threshold

# A thread has 16 elements: 2 or 4 accesses of 16 bytes, and 4 draws of Philox.
BLOCK_M, BLOCK_K, NUM_WARPS = 8, 256, 4


@triton.jit
def _drop_kernel(
    x_ptr, y_ptr, seed_ptr, inverse_keep, M, K, stride_xm, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_xm + offs_k[None, :], mask=inside, other=0.0)
    keep = keep_mask(
        tl.load(seed_ptr), offs_m, first_k // 4, tl.cdiv(K, 4), drop_threshold, BLOCK_K
    )
    y = tl.where(keep, x.to(tl.float32) * inverse_keep, 0.0)
    tl.store(y_ptr + rows * K + offs_k[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@remembered
def drop(x: Tensor, seed: Tensor, dropout_p: float, y: Tensor) -> None:
    """Write y [M, K], packed, from x [M, K] of unit inner stride."""
    tokens, features = x.shape
    with torch.cuda.device_of(x):
        launch(
            _drop_kernel, (triton.cdiv(tokens, BLOCK_M), triton.cdiv(features, BLOCK_K)),
            x, y, seed, 1.0 / (1.0 - dropout_p), tokens, features, x.stride(0),
            drop_threshold(dropout_p) - 2**31,
            BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
        )  # fmt: skip
