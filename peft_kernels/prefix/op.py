"""``prefix_attention``: the autograd Function and the public function.

A call travels one way: ``prefix_attention`` → checks → ``PrefixAttentionFunction`` → ``dispatch`` →
the chosen backend's launcher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import checks, rng
from peft_kernels.core.library import eager_apply, once_differentiable, traced_apply
from peft_kernels.core.operands import arrived, gradient_of, wide_dtype
from peft_kernels.prefix import check
from peft_kernels.prefix.dispatch import (
    PREFIX_ATTENTION,
    PrefixSpec,
    make_spec,
    prefix_backward,
    prefix_forward,
)


class PrefixAttentionFunction(torch.autograd.Function):
    """Attention over [prefix ; sequence], its gradients written out.

    Saved for backward: query, key, value and the prefix as they were given, out, lse, and the small
    tensors beside them (mask, offsets, gate, seed, lse of the prefix where gated).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        gate: Tensor | None,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        seed: Tensor | None,
        scale: float | Tensor | None,
        causal: bool,
        window: int | None,
        dropout_p: float,
        backend: str | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return out [B, Hq, S, d] in ``dtype``, the one that is computed in, and lse."""
        out = query.new_empty(query.shape, dtype=dtype)
        lse = query.new_empty(query.shape[:3], dtype=wide_dtype(dtype))
        prefix_lse = None if gate is None else torch.empty_like(lse)
        prefix_forward(
            query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed, scale,
            causal, window, dropout_p, backend, out, lse, prefix_lse,
        )  # fmt: skip
        scale_tensor = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(
            query, key, value, prefix_key, prefix_value, key_mask, cu_seqlens, gate, seed, out, lse,
            prefix_lse, scale_tensor,
        )  # fmt: skip
        number = None if scale_tensor is not None else scale
        ctx.options = number, causal, window, dropout_p, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the five tensors and of the gate, each where it is needed."""
        if dout is None and dlse is None:
            return (None,) * 15
        *operands, scale_tensor = ctx.saved_tensors
        scale, causal, window, dropout_p, backend = ctx.options
        query, key, value, prefix_key, prefix_value, _, _, gate, _, out, _, _ = operands
        gradients = [
            gradient_of(each) if need else None
            for each, need in zip(
                (query, key, value, prefix_key, prefix_value, gate),
                ctx.needs_input_grad,
                strict=False,
            )
        ]
        prefix_backward(
            torch.zeros_like(out) if dout is None else arrived(dout),
            None if dlse is None else arrived(dlse), *operands,
            scale if scale_tensor is None else scale_tensor, causal, window, dropout_p, backend,
            *gradients,
        )  # fmt: skip
        return (*gradients, *(None,) * 9)


_apply = eager_apply(PrefixAttentionFunction)
_traced_apply = traced_apply(PrefixAttentionFunction)


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    window: int | None = ...,
    gate: Tensor | None = ...,
    dropout_p: float = ...,
    training: bool = ...,
    seed: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    window: int | None = ...,
    gate: Tensor | None = ...,
    dropout_p: float = ...,
    training: bool = ...,
    seed: Tensor | None = ...,
    return_lse: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention over ``[prefix_key ; key]`` and ``[prefix_value ; value]``, differentiable.

    ``softmax(scale · query [prefix_key ; key]ᵀ) [prefix_value ; value]`` without the concatenation:
    a shared prefix is read where it lies by every batch row, and key and value are not copied.
    Every query sees the whole prefix; ``causal``, ``window``, ``key_mask`` and ``cu_seqlens`` are
    about the keys of the sequence. A query that sees nothing (P = 0) gives zeros, and -inf as lse.

    With ``gate`` (LLaMA-Adapter): ``softmax(scale · q kᵀ) v + tanh(gate) · softmax(scale · q
    prefix_keyᵀ) prefix_value``, two softmaxes; at gate = 0 bitwise the attention without a prefix.

    What is computed in: the dtype of query, or the autocast dtype where autocast is on, with sums
    in float32. The prefix may be kept wider: it is cast down, and its gradient, summed over the
    batch and the query heads in float32 in a fixed order, comes back in its own dtype. Backward
    saves query, key, value, the one prefix, the result and lse; nothing of the size of B · P.

    Args:
        query: [B, Hq, S, d]; float64, float32, float16 or bfloat16; any strides; B, S may be 0.
        key: [B, Hkv, T, d] in query's dtype (any float dtype under autocast), Hq a multiple of Hkv
            (each key head serves Hq / Hkv neighbouring query heads); T may be 0.
        value: [B, Hkv, T, d], likewise.
        prefix_key: [Hkv, P, d], the same for every batch row, or [B, Hkv, P, d], in query's dtype
            or a wider one; P may be 0.
        prefix_value: of prefix_key's shape, likewise.
        causal: query i sees the keys up to i + T - S, so that S < T is decoding against a cache
            (SDPA's ``is_causal`` counts from the other end).
        scale: of the scores; None takes 1 / sqrt(d).
        key_mask: bool [B, T], True = keep. Anywhere: padding on either side.
        cu_seqlens: int32 [n + 1] for n sequences packed into one batch row (B = 1, S = T): sequence
            m is cu_seqlens[m] .. cu_seqlens[m + 1] - 1, and sees itself and the prefix. Runs from
            0 to T without a decrease: checked on CPU tensors; on a GPU looking would stop the host.
        window: with causal, keys less than ``window`` positions back are seen, the query's own
            included (flash-attn's ``(window - 1, 0)``, transformers' ``sliding_window``); otherwise
            those less than ``window`` away on either side. Never hides the prefix.
        gate: [Hq], one number for each query head, float; gets a gradient.
        dropout_p: probability in [0, 1) of dropping an attention weight, of the prefix too.
        training: dropout is the identity when False.
        seed: int64 tensor of one element on query's device that fixes the dropout mask, the same on
            every backend; None draws one from torch's generator.
        return_lse: return the logarithm of the softmax's denominator too, differentiable: that over
            everything seen, or with ``gate`` over the sequence alone.
        backend: "triton", "cuda", "cpp" or "reference" to demand one; None takes the best.

    Returns:
        out [B, Hq, S, d] in the dtype that is computed in, or (out, lse) with lse [B, Hq, S],
        float32 (float64 for float64).

    Raises:
        TypeError: an argument is not a dense tensor of an allowed dtype, or dtypes that cannot mix.
        ValueError: shapes that disagree, heads that do not divide, causal with more queries than
            keys, offsets that are none, a window below 1, dropout outside [0, 1), devices that
            differ, an unknown backend.
        BackendUnavailable: a demanded backend cannot serve this call, with every reason.

    Source: Li and Liang, *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, ACL 2021;
    the gate: Zhang et al., *LLaMA-Adapter*, ICLR 2024.

    Example:
        >>> import torch
        >>> from peft_kernels import prefix_attention
        >>> query, key = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 5, 16)
        >>> prefix = torch.randn(2, 3, 16, requires_grad=True)
        >>> out = prefix_attention(query, key, key, prefix, prefix, causal=True)
        >>> out.shape
        torch.Size([2, 8, 5, 16])
        >>> out.sum().backward()
        >>> prefix.grad.shape
        torch.Size([2, 3, 16])
    """
    dtype, autocast, options = check.check_call(
        query, key, value, prefix_key, prefix_value, causal, scale, key_mask, cu_seqlens, window,
        gate, dropout_p, backend,
    )  # fmt: skip
    probability = options.dropout_p if training else 0.0
    if probability == 0.0:
        seed = None
    else:
        seed = (
            rng.draw_seed(query.device) if seed is None else checks.check_seed(seed, query.device)
        )
    apply: Callable[..., tuple[Tensor, Tensor]] = _apply
    run_scale: float | Tensor | None = options.scale
    if torch.compiler.is_compiling():
        apply = _traced_apply
        run_scale = _traced_scale(options.scale, query.shape[3])
    arguments = (
        query, key, value, prefix_key, prefix_value, gate, key_mask, cu_seqlens, seed, run_scale,
        options.causal, options.window, probability, backend, dtype,
    )  # fmt: skip
    if autocast:
        with torch.autocast(query.device.type, enabled=False):
            out, lse = apply(*arguments)
    else:
        out, lse = apply(*arguments)
    return (out, lse) if return_lse else out


def _traced_scale(scale: float | None, head_size: int) -> Tensor | None:
    """Return a scale as a traced op takes it: None is 1 / sqrt(d), another number a CPU tensor."""
    if scale is None or scale == head_size**-0.5:
        return None
    return torch.full((), scale, dtype=torch.float64, device="cpu")


def explain_call(*args: Any, **kwargs: Any) -> tuple[backends.Op, PrefixSpec, str | None]:
    """Return what decides the backend of ``prefix_attention(*args, **kwargs)``, checked alike."""
    bound = inspect.signature(prefix_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    training = given.pop("training")
    given.pop("seed")
    given.pop("return_lse")
    dtype, _, options = check.check_call(**given)
    spec = make_spec(
        given["query"], given["key"], given["prefix_key"], given["key_mask"], given["cu_seqlens"],
        given["gate"], options.causal, options.window, training and options.dropout_p > 0.0, dtype,
    )  # fmt: skip
    return PREFIX_ATTENTION, spec, given["backend"]


backends.explains(prefix_attention, explain_call)
