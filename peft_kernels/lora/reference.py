"""LoRA in plain PyTorch: the specification of every other backend, and the last fallback.

With c = scale / (1 - p) and ``mask`` the keep mask of dropout (all ones when p = 0):

    s  = c (mask * x) Aᵀ            y  = x Wᵀ + bias + s Bᵀ
    ds = c dy B                     dx = dy W + mask * (ds A)
    da = dsᵀ (mask * x)             db = dyᵀ s
    dbias = Σ dy                    dweight = dyᵀ x

``s`` is stored scaled, rounded to the dtype of x, and is all that backward needs beyond x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.core.checks import outside_autocast
from peft_kernels.core.rng import dropout_mask


def _keep(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    if seed is None:
        return None
    return dropout_mask(seed, x.shape[0], x.shape[1], dropout_p)


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0.0)


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
    """Write y [M, N] and the scaled s [M, r] from x [M, K]."""
    dropped = _dropped(x, _keep(x, seed, dropout_p))
    s.copy_(dropped @ lora_a.t() * (scale / (1.0 - dropout_p)))
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    y.addmm_(s, lora_b.t())


@outside_autocast
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
    """Write the gradients that are not None from dy [M, N]."""
    if dx is not None or da is not None:
        ds = dy @ lora_b * (scale / (1.0 - dropout_p))
        ds = ds.to(dy.dtype)
        keep = _keep(x, seed, dropout_p)
        if dx is not None:
            torch.mm(dy, weight, out=dx)
            dx += _dropped(ds @ lora_a, keep)
        if da is not None:
            da.copy_(ds.t() @ _dropped(x, keep))
    if db is not None:
        db.copy_(dy.t() @ s)
    if dbias is not None:
        dbias.copy_(dy.sum(0))
    if dweight is not None:
        torch.mm(dy.t(), x, out=dweight)
