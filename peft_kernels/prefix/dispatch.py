"""Runs one prefix attention call on the backend that serves it.

``run_forward`` and ``run_backward`` bring the tensors into the form that every launcher takes (one
dtype, a unit inner stride) and hand them to the backend chosen. Under ``torch.compile`` the two are
opaque ops, so that the choice, the casts and a warning happen inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, prefix_tiles, triton_runtime
from peft_kernels.core.library import out_variant_op
from peft_kernels.core.operands import narrow, packed, wide_dtype, widen
from peft_kernels.prefix import check, cpp, cuda, flops, reference, split


class PrefixSpec(NamedTuple):
    """What the choice of a prefix attention backend and variant depends on."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    prefix: int
    head_size: int
    shared: bool
    causal: bool
    window: bool
    masked: bool
    packed: bool
    gated: bool
    dropout: bool


def _triton_forward(*args: Any) -> None:
    from peft_kernels.prefix import launch

    launch.prefix_forward(*args)


def _triton_backward(*args: Any, **options: Any) -> None:
    from peft_kernels.prefix import launch

    launch.prefix_backward(*args, **options)


def _triton_why_not(spec: PrefixSpec) -> str | None:
    reason = triton_runtime.why_not(spec.device, spec.dtype)
    return reason or prefix_tiles.why_not(spec.head_size)


def _triton_plan(spec: PrefixSpec) -> str:
    return prefix_tiles.plan(spec.device, spec.dtype, spec.head_size, spec.dropout) + _split(
        spec, "triton"
    )


def _cpp_plan(spec: PrefixSpec) -> str:
    return "fused: own kernel over prefix and sequence" + _split(spec, "cpp")


def _split(spec: PrefixSpec, backend: str) -> str:
    return "; split: the sequence by SDPA's flash kernel" if splits(spec, backend) else ""


def splits(spec: PrefixSpec, backend: str) -> bool:
    """Return whether a call takes the variant ``split``: it can, and the table says that it wins.

    SDPA's flash kernel knows no masks, counts causal from the first key, drops by random numbers of
    its own, and on a GPU serves 16 bits and head sizes in steps of 8. In float32, and of few keys,
    the fused kernel divides by the sum of p once more in backward, which a part cannot.
    """
    if backend not in ("cpp", "triton"):
        return False
    if prefix_tiles.variant(spec.device, spec.queries) != "split":
        return False
    if spec.window or spec.masked or spec.packed or spec.gated or spec.dropout:
        return False
    square = spec.queries == spec.keys or not spec.causal
    served = spec.dtype in (torch.float16, torch.bfloat16) and spec.head_size % 8 == 0
    return square and served and spec.keys >= prefix_tiles.SPLIT_LEAST_KEYS and spec.prefix > 0


PREFIX_ATTENTION = backends.Op(
    "prefix_attention",
    (
        backends.Backend(
            "triton", _triton_forward, _triton_backward, _triton_why_not, _triton_plan
        ),
        cuda_library.backend(cuda),
        backends.Backend("cpp", cpp.forward, cpp.backward, cpp.why_not, _cpp_plan),
        backends.Backend("reference", reference.forward, reference.backward, lambda spec: None),
    ),
)


def make_spec(
    query: Tensor,
    key: Tensor,
    prefix_key: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: Tensor | None,
    causal: bool,
    window: int | None,
    dropout: bool,
    dtype: torch.dtype,
) -> PrefixSpec:
    """Return the spec of a call that is computed in ``dtype``."""
    batch, heads, queries, head_size = query.shape
    shared = prefix_key.dim() == 3 or prefix_key.shape[0] == 1
    return PrefixSpec(
        query.device, dtype, batch, heads, key.shape[1], queries, key.shape[2],
        prefix_key.shape[-2], head_size, shared, causal, window is not None,
        key_mask is not None, cu_seqlens is not None, gate is not None, dropout,
    )  # fmt: skip


def _unit_inner(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype is not dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _batched(prefix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a prefix as [1 or B, Hkv, P, d]."""
    return _unit_inner(prefix if prefix.dim() == 4 else prefix[None], dtype)


def _optional(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else packed(value, dtype)


def _number(scale: float | Tensor | None, head_size: int) -> float:
    return head_size**-0.5 if scale is None else float(scale)


_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _operands(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    dtype: torch.dtype,
) -> _Five:  # fmt: skip
    """Return the five tensors that every launcher starts with, in the form that it takes."""
    return (
        _unit_inner(query, dtype),
        _unit_inner(key, dtype),
        _unit_inner(value, dtype),
        _batched(prefix_key, dtype),
        _batched(prefix_value, dtype),
    )


def _options(
    key_mask: Tensor | None, cu_seqlens: Tensor | None, gate: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return what stands beside them, likewise."""
    return (
        _optional(key_mask, torch.bool),
        _optional(cu_seqlens, torch.int32),
        _optional(gate, wide_dtype(dtype)),
    )


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float | Tensor | None,
    causal: bool,
    window: int | None,
    dropout_p: float,
    backend: str | None,
    out: Tensor,
    lse: Tensor,
    prefix_lse: Tensor | None,
) -> None:
    """Choose a backend and write out, whose dtype is the one computed in, lse and prefix_lse."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check.check_offsets(cu_seqlens, key.shape[2])
    dtype = out.dtype
    spec = make_spec(
        query, key, prefix_key, key_mask, cu_seqlens, gate, causal, window, seed is not None, dtype
    )
    chosen = backends.select(PREFIX_ATTENTION, spec, backend)
    if lse.numel() == 0:
        return
    if key.shape[2] + prefix_key.shape[-2] == 0:
        out.zero_()
        for each in (lse, prefix_lse):
            if each is not None:
                each.fill_(-torch.inf)
        return
    operands = _operands(query, key, value, prefix_key, prefix_value, dtype)
    number = _number(scale, query.shape[3])
    if splits(spec, chosen.name):
        split.forward(chosen.forward, *operands, causal, number, out, lse)
        return
    chosen.forward(
        *operands, *_options(key_mask, cu_seqlens, gate, dtype), seed, causal, number, window,
        dropout_p, out, lse, prefix_lse,
    )  # fmt: skip


def run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    prefix_lse: Tensor | None,
    scale: float | Tensor | None,
    causal: bool,
    window: int | None,
    dropout_p: float,
    backend: str | None,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dprefix_key: Tensor | None,
    dprefix_value: Tensor | None,
    dgate: Tensor | None,
) -> None:
    """Choose a backend and write the gradients that are not None, each in its own dtype."""
    gradients = (dquery, dkey, dvalue, dprefix_key, dprefix_value, dgate)
    if lse.numel() == 0 or key.shape[2] + prefix_key.shape[-2] == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    dtype = out.dtype
    wide = wide_dtype(dtype)
    spec = make_spec(
        query, key, prefix_key, key_mask, cu_seqlens, gate, causal, window, seed is not None, dtype
    )
    chosen = backends.select(PREFIX_ATTENTION, spec, backend)
    # Under autocast tensors may be of another dtype than what is computed in.
    written = (
        *(narrow(each, dtype) for each in gradients[:3]),
        *(_sums(each, dtype, wide) for each in gradients[3:5]),
        narrow(dgate, wide),
    )
    operands = _operands(query, key, value, prefix_key, prefix_value, dtype)
    number = _number(scale, query.shape[3])
    dout = _unit_inner(dout, dtype)
    of_prefix = [_as_batched(each) for each in written[3:5]]
    # The flash kernel takes no gradient of lse: the fused backward fits a split forward too.
    if dlse is None and splits(spec, chosen.name):
        split.backward(
            chosen.backward, dout, *operands, out, lse, causal, number, *written[:3], *of_prefix
        )
    else:
        chosen.backward(
            dout, _optional(dlse, wide), *operands, *_options(key_mask, cu_seqlens, gate, dtype),
            seed, out, lse, prefix_lse, causal, number, window, dropout_p, *written[:3], *of_prefix,
            written[5],
        )  # fmt: skip
    for computed, gradient in zip(written, gradients, strict=True):
        widen(computed, gradient)


def _sums(gradient: Tensor | None, dtype: torch.dtype, wide: torch.dtype) -> Tensor | None:
    """Return where a prefix's gradient is written: itself, in the dtype computed in or a wide one.

    Launchers sum in ``wide`` and round once, to either of the two.
    """
    if gradient is None or gradient.dtype == dtype:
        return gradient
    return narrow(gradient, wide)


def _as_batched(gradient: Tensor | None) -> Tensor | None:
    return gradient[None] if gradient is not None and gradient.dim() == 3 else gradient


# A float argument of an op compiles one graph per value, hence the tensor scale in the schemas: on
# a CPU, where its number is read without waiting for a GPU. None is the scale of nearly every call.
prefix_forward = out_variant_op(
    "prefix_forward",
    run_forward,
    "(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? gate, Tensor? seed, Tensor? scale, bool causal, "
    "SymInt? window, float dropout_p, str? backend, Tensor(a!) out, Tensor(b!) lse, "
    "Tensor(c!)? prefix_lse) -> ()",
    ("out", "lse", "prefix_lse"),
    flops.of_forward,
)
prefix_backward = out_variant_op(
    "prefix_backward",
    run_backward,
    "(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor prefix_key, "
    "Tensor prefix_value, Tensor? key_mask, Tensor? cu_seqlens, Tensor? gate, Tensor? seed, "
    "Tensor out, Tensor lse, Tensor? prefix_lse, Tensor? scale, bool causal, SymInt? window, "
    "float dropout_p, str? backend, Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dvalue, "
    "Tensor(d!)? dprefix_key, Tensor(e!)? dprefix_value, Tensor(f!)? dgate) -> ()",
    ("dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value", "dgate"),
    flops.of_backward,
)
