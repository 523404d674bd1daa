"""Runs one prompt embedding on the backend that serves it.

``run_forward`` and ``run_backward`` bring the tensors into the form that every launcher takes and
hand them to the backend chosen, which on CPUs looks at the ids. Under ``torch.compile`` the two are
opaque ops, so that the choice, that check and a warning happen inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, triton_runtime
from peft_kernels.core.library import out_variant_op
from peft_kernels.prompt import cpp, cuda, reference


class PromptSpec(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype


def _triton_forward(*args: Any) -> None:
    from peft_kernels.prompt import launch

    launch.prompt_forward(*args)


def _triton_backward(*args: Any) -> None:
    from peft_kernels.prompt import launch

    launch.prompt_backward(*args)


def _triton_why_not(spec: PromptSpec) -> str | None:
    return triton_runtime.why_not(spec.device, spec.dtype)


PROMPT_EMBEDDING = backends.Op(
    "prompt_embedding",
    (
        backends.Backend("triton", _triton_forward, _triton_backward, _triton_why_not),
        cuda_library.backend(cuda),
        backends.Backend("cpp", cpp.forward, cpp.backward, lambda spec: cpp.why_not()),
        backends.Backend("reference", reference.forward, reference.backward, lambda spec: None),
    ),
    PromptSpec,
)


def _packed(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.is_contiguous() else value.contiguous()


def _unit_inner(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 or value.shape[-1] <= 1 else value.contiguous()


def run_forward(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    column: int,
    backend: str | None,
    embeddings: Tensor,
    mask_out: Tensor | None,
    labels_out: Tensor | None,
    positions: Tensor,
    columns: Tensor | None,
) -> None:
    """Choose a backend and write every output that is not None; see ``reference.forward``."""
    chosen = backends.select(PROMPT_EMBEDDING, (weight.device, weight.dtype), backend)
    if positions.numel() == 0:
        if columns is not None:
            columns.zero_()
        return
    chosen.forward(
        _packed(input_ids),
        _unit_inner(weight),
        _unit_inner(prompt),
        _packed(mask),
        _packed(labels),
        column,
        embeddings,
        mask_out,
        labels_out,
        positions,
        columns,
    )


def run_backward(
    d_embeddings: Tensor,
    input_ids: Tensor | None,
    columns: Tensor | None,
    column: int,
    padding_idx: int,
    backend: str | None,
    d_prompt: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Choose a backend and write the gradients that are not None; see ``reference.backward``."""
    if d_embeddings.numel() == 0:
        for gradient in (d_prompt, d_weight):
            if gradient is not None:
                gradient.zero_()
        return
    spec = (d_embeddings.device, d_embeddings.dtype)
    backends.select(PROMPT_EMBEDDING, spec, backend).backward(
        _unit_inner(d_embeddings),
        _packed(input_ids),
        columns,
        column,
        padding_idx,
        d_prompt,
        d_weight,
    )


prompt_forward = out_variant_op(
    "prompt_forward",
    run_forward,
    "(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? mask, Tensor? labels, "
    "SymInt column, str? backend, Tensor(a!) embeddings, Tensor(b!)? mask_out, "
    "Tensor(c!)? labels_out, Tensor(d!) positions, Tensor(e!)? columns) -> ()",
    ("embeddings", "mask_out", "labels_out", "positions", "columns"),
)
prompt_backward = out_variant_op(
    "prompt_backward",
    run_backward,
    "(Tensor d_embeddings, Tensor? input_ids, Tensor? columns, SymInt column, "
    "SymInt padding_idx, str? backend, Tensor(a!)? d_prompt, Tensor(b!)? d_weight) -> ()",
    ("d_prompt", "d_weight"),
)
