"""Launchers of the adapter kernels: pick the tile, the grid and the operands of each launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from peft_kernels.adapter import kernels, reference, reference_grouped
from peft_kernels.adapter.grouping import Grouping
from peft_kernels.core import adapter_tiles, tiles
from peft_kernels.core.adapter_tiles import AdapterTile
from peft_kernels.core.launches import launch, remembered
from peft_kernels.core.rng import drop_threshold
from peft_kernels.core.token_reduction import Factor, Groups, Scaling, token_reduction


@remembered
def adapter_forward(
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
    """Write y [M, D] and pre [M, r] in one launch ("library": GEMMs and eager epilogues).

    With ``index`` [M] the parameters are those of E adapters, the adapter's number first.
    """
    tile = _tile(x, pre, "forward")
    with torch.cuda.device_of(x):
        if tile.variant == "library" and index is not None:
            reference_grouped.forward(
                x, down, up, down_bias, up_bias, residual, scale, activation, seed, dropout_p, y,
                pre, index,
            )  # fmt: skip
            return
        if tile.variant == "library":
            keep = _keep(y, seed, dropout_p)
            reference.forward_masked(
                x, down, up, down_bias, up_bias, residual, scale, activation, keep, dropout_p,
                y, pre,
            )  # fmt: skip
            return
        common, grid = _common(x, pre, scale, seed, dropout_p, activation, tile, index, down)
        launch(
            kernels._adapter_forward_kernel,
            grid,
            x_ptr=x,
            down_ptr=down,
            up_ptr=up,
            down_bias_ptr=_some(down_bias, x),
            up_bias_ptr=_some(up_bias, x),
            residual_ptr=_some(residual, x),
            y_ptr=y,
            pre_ptr=pre,
            stride_xm=x.stride(0),
            stride_rm=_some(residual, x).stride(0),
            HAS_DOWN_BIAS=down_bias is not None,
            HAS_UP_BIAS=up_bias is not None,
            RESIDUAL=residual is not None,
            **common,
        )


@remembered
def adapter_backward(
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
    """Write the gradients that are not None: dpre and dx in one launch, the rest in one."""
    tile = _tile(x, pre, "backward")
    with torch.cuda.device_of(x):
        if tile.variant == "library" and index is not None:
            reference_grouped.backward(
                dy, x, pre, down, up, down_bias, up_bias, scale, activation, seed, dropout_p,
                input_residual, dx, d_down, d_up, d_down_bias, d_up_bias, d_scale, index,
            )  # fmt: skip
            return
        if tile.variant == "library":
            reference.backward_masked(
                dy, x, pre, down, up, up_bias, scale, activation, _keep(dy, seed, dropout_p),
                dropout_p, input_residual, dx, d_down, d_up, d_down_bias, d_up_bias, d_scale,
            )  # fmt: skip
            return
        need_dpre = dx is not None or d_down is not None or d_down_bias is not None
        need_hidden = d_up is not None or d_scale is not None
        dpre = torch.empty_like(pre) if need_dpre else pre
        hidden = torch.empty_like(pre) if need_hidden else pre
        common, grid = _common(x, pre, scale, seed, dropout_p, activation, tile, index, down)
        if need_dpre or need_hidden:
            launch(
                kernels._adapter_backward_kernel,
                grid,
                dy_ptr=dy,
                up_ptr=up,
                down_ptr=down,
                pre_ptr=pre,
                dpre_ptr=dpre,
                hidden_ptr=hidden,
                dx_ptr=_some(dx, dy),
                stride_dym=dy.stride(0),
                WGMMA=tiles.wgmma(x.device),
                NEED_DPRE=need_dpre,
                NEED_HIDDEN=need_hidden,
                NEED_DX=dx is not None,
                INPUT_RESIDUAL=input_residual,
                **common,
            )
        groups = None
        if index is not None:
            groups = Groups(common["order_ptr"], common["offsets_ptr"][1:], down.shape[0])
        token_reduction(
            Factor(x, dpre, None if d_down is None else d_down.transpose(-1, -2)),
            Factor(dy, hidden, d_up),
            d_up_bias,
            adapter_tiles.reduction_tile(x.device, x.dtype, x.shape[1], pre.shape[1]),
            seed=seed,
            dropout_p=dropout_p,
            precision=tiles.precision(x.dtype, x.device),
            dropped=1,
            lowsum=d_down_bias,
            scaling=Scaling(scale, 1.0 / (1.0 - dropout_p), d_scale, up, up_bias),
            groups=groups,
        )


def _tile(x: Tensor, pre: Tensor, direction: str) -> AdapterTile:
    tokens, features = x.shape
    return adapter_tiles.adapter_tile(x.device, x.dtype, tokens, features, pre.shape[1], direction)


def _common(
    x: Tensor,
    pre: Tensor,
    scale: float | Tensor,
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
    tile: AdapterTile,
    index: Tensor | None,
    down: Tensor,
) -> tuple[dict[str, Any], tuple[int]]:
    """Return the arguments that both kernels take, and the grid."""
    (tokens, features), bottleneck = x.shape, pre.shape[1]
    order = offsets = first_tiles = pre
    programs, groups, block = triton.cdiv(tokens, tile.block_m), 0, 0
    if index is not None:
        grouping = Grouping.of(index, down.shape[0], tile.block_m)
        order, offsets, first_tiles = grouping.order, grouping.offsets, grouping.tiles
        groups = grouping.count
        # Each group may leave one tile unfilled.
        programs, block = programs + groups, triton.next_power_of_2(groups)
    kind = 1 if not isinstance(scale, Tensor) else 2 if scale.numel() == 1 else 3
    arguments = {
        # Never read without dropout, but a kernel argument has to be some pointer.
        "seed_ptr": _some(seed, pre),
        "order_ptr": order,
        "offsets_ptr": offsets,
        "tiles_ptr": first_tiles,
        "E1": groups,
        "scale": scale,
        "inverse_keep": 1.0 / (1.0 - dropout_p),
        "M": tokens,
        "D": features,
        "R": bottleneck,
        "drop_threshold": drop_threshold(dropout_p) - 2**31,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": tile.block_d,
        "BLOCK_R": adapter_tiles.bottleneck_block(bottleneck),
        "ACTIVATION": activation,
        "DROPOUT": seed is not None,
        "SCALE": kind,
        "GROUPS": block,
        "AHEAD": tile.ahead,
        "PRECISION": tiles.precision(x.dtype, x.device),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return arguments, (programs,)


def _some(value: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if value is None else value


def _keep(like: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """Return the keep mask as bool [M, D], which the library's epilogues multiply with."""
    if seed is None:
        return None
    keep = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    block_m, block_c = 32, 64
    grid = (triton.cdiv(like.shape[0], block_m), triton.cdiv(like.shape[1], block_c))
    launch(
        kernels._keep_mask_kernel, grid,
        keep, seed, like.shape[0], like.shape[1], drop_threshold(dropout_p) - 2**31,
        BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    return keep
