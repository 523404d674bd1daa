"""Launchers of the prompt kernels: pick the tile, the grid and the operands of each launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peft_kernels.core import tiles
from peft_kernels.core.launches import launch, remembered
from peft_kernels.prompt import kernels, mask_bits
from peft_kernels.prompt.reference import CHAIN


@remembered
def prompt_forward(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    column: int,
    embeddings: Tensor,
    mask_out: Tensor | None,
    labels_out: Tensor | None,
    positions: Tensor,
    columns: Tensor | None,
) -> None:
    """Write every output that is not None, in one launch; see ``reference.forward``."""
    (batch, tokens), (vocabulary, width) = input_ids.shape, weight.shape
    length = prompt.shape[-2]
    tile = tiles.prompt_tile(weight.element_size())
    num_tiles = triton.cdiv(tokens + length, tile.block_t) * triton.cdiv(width, tile.block_d)
    one, significant = mask_bits.bits(torch.int64 if mask is None else mask.dtype)
    with torch.cuda.device_of(weight):
        # Pointers that are never read still have to be pointers: positions stands in.
        launch(
            kernels._prompt_forward_kernel, (batch + batch * num_tiles,),
            input_ids, weight, prompt,
            positions if mask is None else mask_bits.as_integers(mask),
            positions if labels is None else labels,
            embeddings,
            positions if mask_out is None else mask_bits.as_integers(mask_out),
            positions if labels_out is None else labels_out,
            positions, positions if columns is None else columns,
            batch, tokens, length, width, vocabulary, weight.stride(0),
            prompt.stride(0) if prompt.dim() == 3 else 0, prompt.stride(-2),
            column, one, significant,
            HAS_MASK=mask is not None, HAS_LABELS=labels is not None, SCAN=columns is not None,
            BLOCK_T=tile.block_t, BLOCK_D=tile.block_d, BLOCK_S=tile.block_s,
            num_warps=tile.num_warps,
        )  # fmt: skip


@remembered
def prompt_backward(
    d_embeddings: Tensor,
    input_ids: Tensor | None,
    columns: Tensor | None,
    column: int,
    padding_idx: int,
    d_prompt: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Write the gradients that are not None, one launch each; see ``reference.backward``."""
    with torch.cuda.device_of(d_embeddings):
        if d_prompt is not None and d_prompt.numel():
            _prompt_gradient(d_embeddings, columns, column, d_prompt)
        if d_weight is not None and input_ids is not None:
            d_weight.zero_()
            if input_ids.numel():
                _table_gradient(d_embeddings, input_ids, columns, column, padding_idx, d_weight)


def _prompt_gradient(dy: Tensor, columns: Tensor | None, column: int, d_prompt: Tensor) -> None:
    batch, width, length = dy.shape[0], dy.shape[2], d_prompt.shape[-2]
    tile = tiles.prompt_gradient_tile(dy.element_size())
    per_sample = d_prompt.dim() == 3
    grid = (
        triton.cdiv(width, tile.block_d),
        triton.cdiv(length, tile.block_t),
        batch if per_sample else 1,
    )
    launch(
        kernels._prompt_gradient_kernel, grid,
        dy, d_prompt if columns is None else columns, d_prompt,
        batch, length, width, dy.stride(0), dy.stride(1), column,
        HAS_COLUMNS=columns is not None, PER_SAMPLE=per_sample, CHAIN=CHAIN,
        BLOCK_P=tile.block_t, BLOCK_D=tile.block_d, num_warps=tile.num_warps,
    )  # fmt: skip


def _table_gradient(
    dy: Tensor,
    input_ids: Tensor,
    columns: Tensor | None,
    column: int,
    padding_idx: int,
    d_weight: Tensor,
) -> None:
    tokens, (vocabulary, width) = input_ids.shape[1], d_weight.shape
    tile = tiles.prompt_gradient_tile(dy.element_size())
    block_d = tile.block_t * tile.block_d  # one row
    # Stable: equal ids stay in the order of their tokens, whatever the library's algorithm.
    ids, order = torch.sort(input_ids.flatten(), stable=True)
    launch(
        kernels._table_gradient_kernel, (len(ids), triton.cdiv(width, block_d)),
        dy, ids, order, order if columns is None else columns, d_weight,
        len(ids), tokens, dy.shape[1] - tokens, width, vocabulary, dy.stride(0), dy.stride(1),
        column, padding_idx,
        HAS_COLUMNS=columns is not None, CHAIN=CHAIN, BLOCK_D=block_d,
        num_warps=tile.num_warps,
    )  # fmt: skip
