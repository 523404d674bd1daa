"""Runs one LoRA call on the backend that serves it.

``run_forward`` and ``run_backward`` bring the tensors into the form that every launcher takes (2-D,
one dtype, a unit stride) and hand them to the backend chosen. Under ``torch.compile`` the two are
opaque ops, so that the choice, the casts and a warning happen inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, extension, triton_runtime
from peft_kernels.core.library import out_variant_op
from peft_kernels.core.operands import as_rows, factors, narrow, packed, rows, widen
from peft_kernels.lora import cpp, cuda, flops, reference


class LoRASpec(NamedTuple):
    """What the choice of a LoRA backend and variant depends on."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    in_features: int
    out_features: int
    rank: int
    dropout: bool


def _triton_forward(*args: Any) -> None:
    from peft_kernels.lora import launch

    launch.lora_forward(*args)


def _triton_backward(*args: Any) -> None:
    from peft_kernels.lora import launch

    launch.lora_backward(*args)


def _triton_why_not(spec: LoRASpec) -> str | None:
    return triton_runtime.why_not(spec.device, spec.dtype)


def _triton_plan(spec: LoRASpec) -> str:
    from peft_kernels.core import lora_tiles

    return lora_tiles.lora_plan(*spec)


def _cpp_why_not(spec: LoRASpec) -> str | None:
    return extension.why_not_products(spec.dtype)


LORA_LINEAR = backends.Op(
    "lora_linear",
    (
        backends.Backend(
            "triton", _triton_forward, _triton_backward, _triton_why_not, _triton_plan
        ),
        cuda_library.backend(cuda),
        backends.Backend("cpp", cpp.forward, cpp.backward, _cpp_why_not),
        backends.Backend("reference", reference.forward, reference.backward, lambda spec: None),
    ),
    LoRASpec,
)


def run_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float | Tensor,
    dropout_p: float,
    backend: str | None,
    y: Tensor,
    s: Tensor,
) -> None:
    """Choose a backend and write y [..., N] and s [M, r]; s's dtype is the one computed in."""
    dtype = s.dtype
    (out_features, in_features), (tokens, rank) = weight.shape, s.shape
    spec = (x.device, dtype, tokens, in_features, out_features, rank, seed is not None)
    chosen = backends.select(LORA_LINEAR, spec, backend)
    if not (tokens and out_features and in_features):
        y.copy_(torch.zeros_like(y) if bias is None else bias.expand_as(y))
        s.zero_()
        return
    x = rows(x, dtype)
    weight, lora_a, lora_b = factors(weight, lora_a, lora_b, dtype)
    if bias is not None:
        bias = packed(bias, dtype)
    if y.dim() != 2:
        y = y.view(tokens, out_features)
    chosen.forward(x, weight, lora_a, lora_b, bias, seed, scale, dropout_p, y, s)


def run_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor | None,
    scale: float | Tensor,
    dropout_p: float,
    backend: str | None,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dbias: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Choose a backend and write the gradients that are not None."""
    dtype = s.dtype
    (out_features, in_features), (tokens, rank) = weight.shape, s.shape
    spec = (x.device, dtype, tokens, in_features, out_features, rank, seed is not None)
    chosen = backends.select(LORA_LINEAR, spec, backend)
    if not (tokens and out_features and in_features):
        for gradient in (dx, da, db, dweight):
            if gradient is not None:
                gradient.zero_()
        if dbias is not None:
            dbias.copy_(dy.reshape(tokens, out_features).sum(0))
        return
    dy, x = rows(dy, dtype), rows(x, dtype)
    weight, lora_a, lora_b = factors(weight, lora_a, lora_b, dtype)
    # Under autocast x and weight may be wider than what is computed in.
    dx_narrow, dweight_narrow = narrow(dx, dtype), narrow(dweight, dtype)
    chosen.backward(
        dy, x, s, weight, lora_a, lora_b, seed, scale, dropout_p,
        as_rows(dx_narrow), da, db, dbias, dweight_narrow,
    )  # fmt: skip
    widen(dx_narrow, dx)
    widen(dweight_narrow, dweight)


# A float argument of an op compiles one graph per value, hence the 0-d tensor in the schemas.
lora_forward = out_variant_op(
    "lora_forward",
    run_forward,
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "Tensor scale, float dropout_p, str? backend, Tensor(a!) y, Tensor(b!) s) -> ()",
    ("y", "s"),
    flops.of_forward,
)
lora_backward = out_variant_op(
    "lora_backward",
    run_backward,
    "(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? seed, "
    "Tensor scale, float dropout_p, str? backend, Tensor(a!)? dx, Tensor(b!)? da, Tensor(c!)? db, "
    "Tensor(d!)? dbias, Tensor(e!)? dweight) -> ()",
    ("dx", "da", "db", "dbias", "dweight"),
    flops.of_backward,
)
