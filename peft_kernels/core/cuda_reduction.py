"""``core/token_reduction.py`` on the CUDA library: the same sums, in one launch too."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.core import cuda_library, triton_runtime
from peft_kernels.core.factors import Factor, Groups, Scaling
from peft_kernels.core.rng import drop_threshold

# As csrc/cuda/token_reduction.cu has them: a tile of columns and ranks, and tokens worth a part.
_TILE, _TOKENS = 64, 64


def token_reduction(
    first: Factor,
    second: Factor,
    colsum: Tensor | None,
    *,
    seed: Tensor | None,
    dropout_p: float,
    dropped: int = 0,
    lowsum: Tensor | None = None,
    scaling: Scaling | None = None,
    groups: Groups | None = None,
) -> None:
    """Write both products and both sums, each where it is not None; arguments as in Triton's."""
    gradient = None if scaling is None else scaling.gradient
    if gradient is not None:
        # The gradient of the scale is made from both, needed or not.
        out = (
            second.out
            if second.out is not None
            else second.low.new_empty(second.v.shape[1], second.low.shape[1])
        )
        second = Factor(second.v, second.low, out)
        if colsum is None:
            colsum = second.v.new_empty(second.v.shape[1])
    wanted = (first.out, second.out, colsum, lowsum)
    if all(each is None for each in wanted):
        return
    out0, out1, column_sums, low_sums = served = [_served(each) for each in wanted]
    device = first.v.device
    tokens, rank = first.low.shape
    columns0, columns1 = first.v.shape[1], second.v.shape[1]
    rank_blocks = -(-rank // _TILE)
    tiles = (-(-columns0 // _TILE) - (-columns1 // _TILE)) * rank_blocks
    splits = 1 if groups else _splits(tokens, tiles, device)

    def floats(size: int, needed: bool) -> Tensor | None:
        return torch.empty(size, dtype=torch.float32, device=device) if needed else None

    scale = None if scaling is None else scaling.scale
    cuda_library.call(
        "token_reduction",
        first.v, first.low, out0, low_sums, second.v, second.low, out1, column_sums,
        seed, drop_threshold(dropout_p), dropped, splits,
        floats(splits * ((columns0 + columns1) * rank + columns1 + rank), splits > 1),
        triton_runtime.counters(device, tiles + 1),
        groups.order if groups else None, groups.offsets if groups else None,
        scaling is not None, scale if isinstance(scale, Tensor) else None,
        scale if isinstance(scale, float) else 1.0, scaling.inverse_keep if scaling else 1.0,
        scaling.weight if scaling else None, scaling.bias if scaling else None,
        gradient, floats(rank_blocks * columns1, gradient is not None),
    )  # fmt: skip
    for given, computed in zip(wanted, served, strict=True):
        if given is not None and computed is not None and computed is not given:
            given.copy_(computed)


def _served(out: Tensor | None) -> Tensor | None:
    """Return an output that the kernel can write: a fresh float32 one in place of float64."""
    if out is None or out.dtype != torch.float64:
        return out
    return torch.empty_like(out, dtype=torch.float32)


def _splits(tokens: int, tiles: int, device: torch.device) -> int:
    """Return how many parts the tokens are summed in: enough blocks to fill the GPU twice.

    A function of the shapes and the device alone, so that a run repeats bit for bit.
    """
    wanted = 16 if device.type != "cuda" else 2 * triton_runtime.multiprocessors(device.index or 0)
    return max(1, min(64, wanted // tiles, tokens // _TOKENS))
