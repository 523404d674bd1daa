"""The bottleneck adapter in plain PyTorch: the specification of every other backend.

With ``mask`` the keep mask of dropout (all ones when p = 0), q = 1 / (1 - p) and c = scale · q, one
number or one for each channel of D:

    pre  = x downᵀ + down_bias         h  = act(pre)
    y    = residual + c (mask * (h upᵀ + up_bias))

    g    = mask * dy
    dpre = act'(pre) * ((c g) up)      dx = dpre down (+ dy where the residual is x)
    d_down = dpreᵀ x                   d_down_bias = Σ dpre
    d_up = c (gᵀ h)                    d_up_bias = c Σ g
    d_scale = q (Σ_j up * (gᵀ h) + up_bias * Σ g)    for each channel, or summed over them

``pre`` [M, r], rounded to the dtype of x, is all that backward needs beyond x: the gradient of the
scale comes from the product that d_up needs anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.adapter.activations import activate, derivative
from peft_kernels.core.checks import outside_autocast
from peft_kernels.core.operands import wide_dtype
from peft_kernels.core.rng import dropout_mask


def _keep(like: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    if seed is None:
        return None
    return dropout_mask(seed, like.shape[0], like.shape[1], dropout_p)


def _hidden(activation: str, pre: Tensor) -> Tensor:
    return activate(activation, pre.to(wide_dtype(pre.dtype))).to(pre.dtype)


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
) -> None:
    """Write y [M, D] and pre [M, r] from x [M, D]."""
    keep = _keep(y, seed, dropout_p)
    forward_masked(
        x, down, up, down_bias, up_bias, residual, scale, activation, keep, dropout_p, y, pre
    )


def forward_masked(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    scale: float | Tensor,
    activation: str,
    keep: Tensor | None,
    dropout_p: float,
    y: Tensor,
    pre: Tensor,
) -> None:
    """Do what ``forward`` does under a mask that is there already, bool [M, D] or None."""
    _affine(x, down, down_bias, pre)
    branch = torch.empty_like(y)
    _affine(_hidden(activation, pre), up, up_bias, branch)
    if keep is not None:
        branch.mul_(keep)
    factor = scale / (1.0 - dropout_p)
    if isinstance(factor, Tensor):
        branch = branch * factor
        y.copy_(branch if residual is None else residual + branch)
    elif residual is None:
        torch.mul(branch, factor, out=y)
    else:
        torch.add(residual, branch, alpha=factor, out=y)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


@outside_autocast
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
) -> None:
    """Write the gradients that are not None from dy [M, D]."""
    backward_masked(
        dy, x, pre, down, up, up_bias, scale, activation, _keep(dy, seed, dropout_p), dropout_p,
        input_residual, dx, d_down, d_up, d_down_bias, d_up_bias, d_scale,
    )  # fmt: skip


def backward_masked(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    scale: float | Tensor,
    activation: str,
    keep: Tensor | None,
    dropout_p: float,
    input_residual: bool,
    dx: Tensor | None,
    d_down: Tensor | None,
    d_up: Tensor | None,
    d_down_bias: Tensor | None,
    d_up_bias: Tensor | None,
    d_scale: Tensor | None,
) -> None:
    """Do what ``backward`` does under a mask that is there already, bool [M, D] or None."""
    g = dy if keep is None else dy * keep
    inverse_keep = 1.0 / (1.0 - dropout_p)
    factor = scale * inverse_keep
    if dx is not None or d_down is not None or d_down_bias is not None:
        dpre = _bottleneck_gradient(g, pre, up, factor, activation)
        if dx is not None and input_residual:
            torch.addmm(dy, dpre, down, out=dx)
        elif dx is not None:
            torch.mm(dpre, down, out=dx)
        if d_down is not None:
            d_down.copy_(dpre.t() @ x)
        if d_down_bias is not None:
            d_down_bias.copy_(dpre.sum(0))
    if d_up is None and d_up_bias is None and d_scale is None:
        return
    # The gradient of the scale adds products of gᵀ h: those are not rounded before.
    wide = g.dtype if d_scale is None else wide_dtype(g.dtype)
    channel = factor.reshape(-1) if isinstance(factor, Tensor) else factor
    product = torch.mm(g.t().to(wide), _hidden(activation, pre).to(wide))
    colsum = g.sum(0, dtype=wide_dtype(g.dtype))
    if d_up is not None:
        d_up.copy_(product * (channel[:, None] if isinstance(channel, Tensor) else channel))
    if d_up_bias is not None:
        d_up_bias.copy_(colsum * channel)
    if d_scale is not None:
        by_channel = (up * product).sum(1)
        if up_bias is not None:
            by_channel += up_bias * colsum
        total = by_channel if d_scale.numel() == by_channel.numel() else by_channel.sum()
        d_scale.copy_((total * inverse_keep).reshape(d_scale.shape))


def _bottleneck_gradient(
    g: Tensor, pre: Tensor, up: Tensor, factor: float | Tensor, activation: str
) -> Tensor:
    """Return dpre [M, r]."""
    if isinstance(factor, Tensor) and factor.numel() > 1:
        dh = (g * factor).to(g.dtype) @ up
    else:
        dh = (g @ up) * factor
    return (derivative(activation, pre.to(wide_dtype(pre.dtype))) * dh).to(pre.dtype)
