"""Many adapters in plain PyTorch: one after the other on the rows that carry their number.

Rows with index -1 have no adapter: y is the residual there, and dx is dy where that is x.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from peft_kernels.adapter import reference
from peft_kernels.core.checks import outside_autocast
from peft_kernels.core.rng import dropout_mask


def _members(index: Tensor, adapters: int) -> Iterator[tuple[int, Tensor]]:
    for number in range(adapters):
        yield number, (index == number).nonzero().flatten()


def _at(value: Tensor | None, place: int | Tensor) -> Tensor | None:
    return None if value is None else value[place]


def _keep(like: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    if seed is None:
        return None
    return dropout_mask(seed, like.shape[0], like.shape[1], dropout_p)


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
    index: Tensor,
) -> None:
    """Write y [M, D] and pre [M, r]; the parameters have the adapter's number first."""
    keep = _keep(y, seed, dropout_p)
    y.zero_() if residual is None else y.copy_(residual)
    pre.zero_()
    for number, rows in _members(index, down.shape[0]):
        own_y, own_pre = y.new_empty(len(rows), y.shape[1]), pre.new_empty(len(rows), pre.shape[1])
        reference.forward_masked(
            x[rows], down[number], up[number], _at(down_bias, number), _at(up_bias, number),
            _at(residual, rows), scale, activation, _at(keep, rows), dropout_p, own_y, own_pre,
        )  # fmt: skip
        y[rows], pre[rows] = own_y, own_pre


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
    index: Tensor,
) -> None:
    """Write the gradients that are not None; ``d_scale`` must be None."""
    keep = _keep(dy, seed, dropout_p)
    if dx is not None:
        dx.copy_(dy) if input_residual else dx.zero_()
    for number, rows in _members(index, down.shape[0]):
        own_dx = None if dx is None else dx.new_empty(len(rows), dx.shape[1])
        reference.backward_masked(
            dy[rows], x[rows], pre[rows], down[number], up[number], _at(up_bias, number), scale,
            activation, _at(keep, rows), dropout_p, input_residual, own_dx, _at(d_down, number),
            _at(d_up, number), _at(d_down_bias, number), _at(d_up_bias, number), None,
        )  # fmt: skip
        if dx is not None and own_dx is not None:
            dx[rows] = own_dx
