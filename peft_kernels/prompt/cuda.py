"""Launchers of the CUDA backend: the prompt kernels of csrc/cuda/prompt.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.core import cuda_library
from peft_kernels.core.operands import narrow, widen
from peft_kernels.prompt import mask_bits


def forward(
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
    one, significant = mask_bits.bits(torch.int64 if mask is None else mask.dtype)
    cuda_library.call(
        "prompt_forward",
        input_ids, weight, prompt.float() if prompt.dtype == torch.float64 else prompt, mask,
        labels, column, one, significant, embeddings, mask_out, labels_out, positions, columns,
    )  # fmt: skip


def backward(
    d_embeddings: Tensor,
    input_ids: Tensor | None,
    columns: Tensor | None,
    column: int,
    padding_idx: int,
    d_prompt: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Write the gradients that are not None, one launch each; see ``reference.backward``."""
    if d_prompt is not None and d_prompt.numel():
        # The kernels know no float64; the sums are float32 whatever they are rounded to.
        sums = narrow(d_prompt, torch.float32) if d_prompt.dtype == torch.float64 else d_prompt
        cuda_library.call("prompt_gradient", d_embeddings, columns, column, sums)
        widen(sums, d_prompt)
    if d_weight is not None and input_ids is not None:
        d_weight.zero_()
        if input_ids.numel():
            # Stable: equal ids stay in the order of their tokens, whatever the library's algorithm.
            ids, order = torch.sort(input_ids.flatten(), stable=True)
            cuda_library.call(
                "table_gradient", d_embeddings, ids, order, columns, column, padding_idx,
                input_ids.shape[1], d_weight,
            )  # fmt: skip
