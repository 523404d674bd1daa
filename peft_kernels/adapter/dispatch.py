"""Runs one adapter call on the backend that serves it.

``run_forward`` and ``run_backward`` bring the tensors into the form that every launcher takes (2-D,
one dtype, a unit stride) and hand them to the backend chosen. Under ``torch.compile`` the two are
opaque ops, so that the choice, the check of an index, the casts and a warning happen inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.adapter import check, cpp, cuda, flops, reference, reference_grouped
from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, extension, triton_runtime
from peft_kernels.core.library import out_variant_op
from peft_kernels.core.operands import as_rows, narrow, packed, rows, wide_dtype, widen


class AdapterSpec(NamedTuple):
    """What the choice of an adapter backend and variant depends on."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    features: int
    bottleneck: int
    dropout: bool


def _triton_forward(*args: Any) -> None:
    from peft_kernels.adapter import launch

    launch.adapter_forward(*args)


def _triton_backward(*args: Any) -> None:
    from peft_kernels.adapter import launch

    launch.adapter_backward(*args)


def _triton_why_not(spec: AdapterSpec) -> str | None:
    return triton_runtime.why_not(spec.device, spec.dtype)


def _triton_plan(spec: AdapterSpec) -> str:
    from peft_kernels.core import adapter_tiles

    return adapter_tiles.plan(*spec[:5])


def _cpp_why_not(spec: AdapterSpec) -> str | None:
    return extension.why_not_products(spec.dtype)


ADAPTER = backends.Op(
    "adapter",
    (
        backends.Backend(
            "triton", _triton_forward, _triton_backward, _triton_why_not, _triton_plan
        ),
        cuda_library.backend(cuda),
        backends.Backend("cpp", cpp.forward, cpp.backward, _cpp_why_not),
        backends.Backend("reference", reference.forward, reference.backward, lambda spec: None),
    ),
    AdapterSpec,
)


# As launchers of one adapter, with the index of every row as one more argument.
ADAPTER_GROUPED = backends.Op(
    "adapter_grouped",
    (
        backends.Backend(
            "triton", _triton_forward, _triton_backward, _triton_why_not, _triton_plan
        ),
        cuda_library.backend(cuda),
        backends.Backend("cpp", cpp.forward, cpp.backward, _cpp_why_not),
        backends.Backend(
            "reference", reference_grouped.forward, reference_grouped.backward, lambda spec: None
        ),
    ),
    AdapterSpec,
)


def _optional(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else packed(value, dtype)


def _scale(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return the scale as launchers take it: a number, or 1 or D elements, contiguous."""
    if not isinstance(scale, Tensor):
        return scale
    return packed(scale, wide_dtype(dtype)).reshape(-1)


def _op(index: Tensor | None) -> backends.Op:
    return ADAPTER if index is None else ADAPTER_GROUPED


def run_forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    input_residual: bool,
    scale: float | Tensor,
    activation: str,
    seed: Tensor | None,
    dropout_p: float,
    backend: str | None,
    index: Tensor | None,
    y: Tensor,
    pre: Tensor,
) -> None:
    """Choose a backend and write y [..., D] and pre [M, r]; their dtype is the one computed in."""
    dtype = pre.dtype
    (tokens, bottleneck), features = pre.shape, up.shape[-2]
    if not tokens:
        return
    if index is not None and index.device.type == "cpu":
        check.check_index(index, down.shape[0])
    spec = (x.device, dtype, tokens, features, bottleneck, seed is not None)
    x = rows(x, dtype)
    if residual is not None:
        residual = rows(residual, dtype)
    backends.select(_op(index), spec, backend).forward(
        x,
        packed(down, dtype),
        packed(up, dtype),
        _optional(down_bias, dtype),
        _optional(up_bias, dtype),
        x if input_residual else residual,
        _scale(scale, dtype),
        activation,
        seed,
        dropout_p,
        y if y.dim() == 2 else y.view(tokens, features),
        pre,
        *(() if index is None else (index,)),
    )


def run_backward(
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
    backend: str | None,
    index: Tensor | None,
    input_residual: bool,
    dx: Tensor | None,
    d_down: Tensor | None,
    d_up: Tensor | None,
    d_down_bias: Tensor | None,
    d_up_bias: Tensor | None,
    d_scale: Tensor | None,
) -> None:
    """Choose a backend and write the gradients that are not None."""
    dtype = pre.dtype
    (tokens, bottleneck), features = pre.shape, up.shape[-2]
    if not tokens:
        for gradient in (d_down, d_up, d_down_bias, d_up_bias, d_scale):
            if gradient is not None:
                gradient.zero_()
        return
    spec = (x.device, dtype, tokens, features, bottleneck, seed is not None)
    # Under autocast x may be wider than what is computed in.
    dx_narrow = narrow(dx, dtype)
    backends.select(_op(index), spec, backend).backward(
        rows(dy, dtype),
        rows(x, dtype),
        pre,
        packed(down, dtype),
        packed(up, dtype),
        _optional(down_bias, dtype),
        _optional(up_bias, dtype),
        _scale(scale, dtype),
        activation,
        seed,
        dropout_p,
        input_residual,
        as_rows(dx_narrow),
        d_down,
        d_up,
        d_down_bias,
        d_up_bias,
        d_scale,
        *(() if index is None else (index,)),
    )
    widen(dx_narrow, dx)


# A float argument of an op compiles one graph per value, hence the tensor scale in the schemas.
adapter_forward = out_variant_op(
    "adapter_forward",
    run_forward,
    "(Tensor x, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, Tensor? residual, "
    "bool input_residual, Tensor scale, str activation, Tensor? seed, float dropout_p, "
    "str? backend, Tensor? index, Tensor(a!) y, Tensor(b!) pre) -> ()",
    ("y", "pre"),
    flops.of_forward,
)
adapter_backward = out_variant_op(
    "adapter_backward",
    run_backward,
    "(Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, Tensor? down_bias, "
    "Tensor? up_bias, Tensor scale, str activation, Tensor? seed, float dropout_p, str? backend, "
    "Tensor? index, bool input_residual, Tensor(a!)? dx, Tensor(b!)? d_down, Tensor(c!)? d_up, "
    "Tensor(d!)? d_down_bias, Tensor(e!)? d_up_bias, Tensor(f!)? d_scale) -> ()",
    ("dx", "d_down", "d_up", "d_down_bias", "d_up_bias", "d_scale"),
    flops.of_backward,
)
