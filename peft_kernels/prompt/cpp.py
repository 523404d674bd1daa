"""Launchers of the C++ CPU backend: rows are copied whole, gradients summed in ``_C``."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.core import extension
from peft_kernels.core.operands import pointer
from peft_kernels.prompt import mask_bits, token_ids

# As ``pk::Float`` in csrc/cpu/prompt.h numbers them.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def why_not() -> str | None:
    """Return the reason against this backend, or None; it serves every dtype."""
    return extension.why_not()


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
    """Write every output that is not None; see ``reference.forward``. Raises IndexError."""
    narrows = prompt.dtype is not weight.dtype
    if narrows and (prompt.dtype, weight.dtype) != (torch.float32, torch.bfloat16):
        prompt, narrows = prompt.to(weight.dtype), False
    size, prompt_size = weight.element_size(), prompt.element_size()
    one, significant = mask_bits.bits(torch.int64 if mask is None else mask.dtype)
    inside = extension.load().prompt_forward(
        *input_ids.shape, prompt.shape[-2], weight.shape[1] * size,
        input_ids.data_ptr(), input_ids.element_size(), weight.data_ptr(), weight.stride(0) * size,
        weight.shape[0], prompt.data_ptr(), prompt.stride(-2) * prompt_size,
        prompt.stride(0) * prompt_size if prompt.dim() == 3 else 0, narrows,
        pointer(mask), 0 if mask is None else mask.element_size(), one, significant,
        pointer(labels), 0 if labels is None else labels.element_size(), column,
        embeddings.data_ptr(), pointer(mask_out), pointer(labels_out), positions.data_ptr(),
        pointer(columns),
    )  # fmt: skip
    if not inside:
        token_ids.check(input_ids, weight.shape[0])


def backward(
    d_embeddings: Tensor,
    input_ids: Tensor | None,
    columns: Tensor | None,
    column: int,
    padding_idx: int,
    d_prompt: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Write the gradients that are not None; see ``reference.backward``."""
    dy = d_embeddings
    if d_weight is not None:
        d_weight.zero_()
    if d_weight is None or input_ids is None or input_ids.numel() == 0:
        ids = order = d_weight = None
    else:
        ids, order = torch.sort(input_ids.flatten().long(), stable=True)
    tokens = 0 if input_ids is None else input_ids.shape[1]
    length = 0 if d_prompt is None else d_prompt.shape[-2]
    if ids is not None:
        length = dy.shape[1] - tokens
    extension.load().prompt_backward(
        _TYPES[dy.dtype], _TYPES[dy.dtype if d_prompt is None else d_prompt.dtype],
        dy.shape[0], tokens, length, dy.shape[2],
        dy.data_ptr(), dy.stride(0), dy.stride(1), pointer(columns), column,
        pointer(d_prompt), d_prompt is not None and d_prompt.dim() == 3,
        pointer(ids), pointer(order), padding_idx, pointer(d_weight),
    )  # fmt: skip
