"""Launchers of the LoRA kernels: pick the tile, the grid and the operands of each launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels.core import lora_tiles, tiles, triton_runtime
from peft_kernels.core.launches import counters, launch, remembered
from peft_kernels.core.rng import drop_threshold
from peft_kernels.core.token_reduction import Factor, token_reduction
from peft_kernels.lora import kernels, tma_kernels

# Where dropout acts, as the kernels number it.
_NOWHERE, _ON_INPUT, _ON_OUTPUT = 0, 1, 2


@dataclass(frozen=True)
class _Operands:
    """y [M, N] = x wᵀ + bias + s bᵀ with s = scale · x aᵀ; w is [N, K], a [R, K], b [N, R]."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    s: Tensor
    seed: Tensor | None
    scale: float | Tensor
    dropout_p: float
    dropout: int
    direction: str

    def low_rank(self) -> dict[str, object]:
        """Return what every kernel that computes s takes."""
        return {
            "x_ptr": self.x,
            "a_ptr": self.a,
            "s_ptr": self.s,
            # Never read without dropout, but a kernel argument has to be some pointer.
            "seed_ptr": self.seed if self.seed is not None else self.s,
            "scale": self.scale,
            "inverse_keep": 1.0 / (1.0 - self.dropout_p),
            "M": self.x.shape[0],
            "K": self.x.shape[1],
            "R": self.a.shape[0],
            "stride_xm": self.x.stride(0),
            "stride_ar": self.a.stride(0),
            "stride_ak": self.a.stride(1),
            "drop_threshold": drop_threshold(self.dropout_p) - 2**31,
            "BLOCK_R": lora_tiles.rank_block(self.a.shape[0]),
            "DROPOUT": self.dropout,
            "SCALE_IS_POINTER": isinstance(self.scale, Tensor),
            "PRECISION": tiles.precision(self.x.dtype, self.x.device),
        }


@remembered
def lora_forward(
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
    """Write y [M, N] and s [M, r] in one launch ("split": the library GEMM and two more)."""
    dropout, direction = (_NOWHERE, "forward") if seed is None else (_ON_INPUT, "dropped")
    operands = _Operands(
        x, weight, lora_a, lora_b, bias, s, seed, scale, dropout_p, dropout, direction
    )
    with torch.cuda.device_of(x):
        _product(operands, y)


@remembered
def lora_backward(
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
    """Write the gradients that are not None: dS and dX in one launch, dA, dB and dbias in one."""
    with torch.cuda.device_of(x):
        ds = s
        if dx is not None or da is not None:
            ds = torch.empty_like(s)
            dropout, direction = (_NOWHERE, "backward") if seed is None else (_ON_OUTPUT, "masked")
            operands = _Operands(
                dy, weight.t(), lora_b.t(), lora_a.t(), None, ds, seed, scale, dropout_p,
                dropout, direction,
            )  # fmt: skip
            if dx is None:
                _low_rank(operands)
            else:
                _product(operands, dx)
        token_reduction(
            Factor(x, ds, None if da is None else da.t()),
            Factor(dy, s, db),
            dbias,
            tiles.reduction_tile(x.device, x.dtype, lora_a.shape[0]),
            seed=seed,
            dropout_p=dropout_p,
            precision=tiles.precision(x.dtype, x.device),
        )
        if dweight is not None:
            torch.mm(dy.t(), x, out=dweight)


def _product(operands: _Operands, y: Tensor) -> None:
    x, w = operands.x, operands.w
    (tokens, depth), columns = x.shape, w.shape[0]
    wanted = (x.device, x.dtype, tokens, operands.a.shape[0], operands.direction, _aligned(x, w))
    tile = lora_tiles.lora_tile(*wanted, work=tokens * depth * columns)
    if tile.variant == "ticket_tma":
        if _describable(x, w, y):
            _ticket_tma(operands, y, tile)
            return
        tile = lora_tiles.lora_tile(*wanted, tma=False)
    if tile.variant == "split":
        _split(operands, y)
        return
    num_m = triton.cdiv(tokens, tile.block_m)
    num_tiles = num_m * triton.cdiv(columns, tile.block_n)
    arguments = operands.low_rank() | {
        "w_ptr": w,
        "b_ptr": operands.b,
        "bias_ptr": operands.bias if operands.bias is not None else operands.b,
        "y_ptr": y,
        "N": columns,
        "stride_wn": w.stride(0),
        "stride_wk": w.stride(1),
        "stride_bn": operands.b.stride(0),
        "stride_br": operands.b.stride(1),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "EVEN_K": depth % tile.block_k == 0,
        "HAS_BIAS": operands.bias is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if tile.variant == "recompute":
        launch(kernels._lora_recompute_kernel, (num_tiles,), **arguments)
        return
    num_r = triton.cdiv(operands.a.shape[0], arguments["BLOCK_R"])
    tickets = counters(x.device, 2 + num_m)
    programs = min(num_tiles + num_m * num_r, _resident_programs(x.device))
    launch(kernels._lora_ticket_kernel, (programs,), **arguments, counters_ptr=tickets)


def _ticket_tma(operands: _Operands, y: Tensor, tile: lora_tiles.LoRATile) -> None:
    x, w, b = operands.x, operands.w, operands.b
    block_m, block_n, block_k = tile.block_m, tile.block_n, tile.block_k
    block_p = lora_tiles.low_rank_rows(tile)
    k_inner = w.stride(1) == 1
    slices = lora_tiles.store_slices(tile, operands.dropout == _ON_OUTPUT)
    arguments = operands.low_rank()
    del arguments["x_ptr"], arguments["stride_xm"]
    num_m = triton.cdiv(x.shape[0], block_m)
    num_r = triton.cdiv(b.shape[1], arguments["BLOCK_R"])
    num_tiles = num_m * triton.cdiv(w.shape[0], block_n)
    programs = _resident_programs(x.device)
    if block_m * block_n > 128 * 128:
        # The accumulators alone are half of the registers of a multiprocessor.
        programs = triton.cdiv(programs, 2)
    producers = triton.cdiv(x.shape[0], block_p) * num_r
    programs = min(num_tiles + producers, programs)
    launch(
        tma_kernels._lora_ticket_tma_kernel,
        (programs,),
        **arguments,
        x_desc=_descriptor(x, [block_m, block_k]),
        rows_desc=_descriptor(x, [block_p, block_k]),
        w_desc=_descriptor(w, [block_n, block_k])
        if k_inner
        else _descriptor(w.t(), [block_k, block_n]),
        y_desc=_descriptor(y, [block_m, block_n // slices]),
        b_ptr=b,
        bias_ptr=operands.bias if operands.bias is not None else b,
        counters_ptr=counters(x.device, 2 + num_m),
        N=w.shape[0],
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_P=block_p,
        GROUP_M=tile.group_m,
        K_INNER=k_inner,
        HAS_BIAS=operands.bias is not None,
        THREADS=32 * tile.num_warps,
        LOW_RANK_STAGES=lora_tiles.low_rank_stages(tile),
        SLICES=slices,
        EIGHTS=0 if b.shape[1] % 16 == 0 or b.shape[1] % 8 else 2 if b.stride(0) == 1 else 1,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, matrix.shape, matrix.stride(), block)


def _describable(*matrices: Tensor) -> bool:
    """Return whether tensor descriptors may name these: the rules of TMA.

    One stride is 1; the other and the address are multiples of 16 bytes; rows do not overlap.
    """
    for matrix in matrices:
        (rows, columns), (stride, inner) = matrix.shape, matrix.stride()
        if inner != 1:
            columns, stride, inner = rows, inner, stride
        pitch = stride * matrix.element_size()
        if inner != 1 or stride < columns or pitch % 16 or matrix.data_ptr() % 16 or pitch >> 40:
            return False
    return True


def _aligned(x: Tensor, w: Tensor) -> bool:
    """Return whether x [M, K] and w [N, K] can be copied asynchronously, unmasked in K."""
    sizes = (*w.shape, x.stride(0), *(stride for stride in w.stride() if stride != 1))
    uneven = any(size % 16 for size in (*sizes, x.data_ptr(), w.data_ptr()))
    return not uneven and x.shape[1] % 64 == 0


def _resident_programs(device: torch.device) -> int:
    """Return how many programs the persistent grid has: progress needs no particular number."""
    if device.type != "cuda":
        return 2
    return 2 * triton_runtime.multiprocessors(device.index or 0)


def _low_rank(operands: _Operands) -> None:
    """Launch the kernel that computes s alone."""
    x = operands.x
    tile = lora_tiles.low_rank_tile(x.device, x.dtype)
    arguments = operands.low_rank()
    grid = (
        triton.cdiv(x.shape[0], tile.block_m),
        triton.cdiv(operands.a.shape[0], arguments["BLOCK_R"]),
    )
    launch(
        kernels._low_rank_kernel,
        grid,
        **arguments,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _split(operands: _Operands, y: Tensor) -> None:
    """The library GEMM for x wᵀ, then s, then the rank-r update in place."""
    x, w, b = operands.x, operands.w, operands.b
    if operands.bias is None:
        torch.mm(x, w.t(), out=y)
    else:
        torch.addmm(operands.bias, x, w.t(), out=y)
    _low_rank(operands)
    if operands.dropout != _ON_OUTPUT:
        y.addmm_(operands.s, b.t())
        return
    tile = lora_tiles.low_rank_tile(x.device, x.dtype)
    arguments = operands.low_rank()
    grid = (triton.cdiv(y.shape[0], tile.block_m), triton.cdiv(y.shape[1], tile.block_n))
    launch(
        kernels._masked_update_kernel,
        grid,
        y_ptr=y,
        s_ptr=operands.s,
        b_ptr=b,
        seed_ptr=operands.seed,
        M=y.shape[0],
        N=y.shape[1],
        R=b.shape[1],
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        drop_threshold=arguments["drop_threshold"],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=arguments["BLOCK_R"],
        PRECISION=arguments["PRECISION"],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
