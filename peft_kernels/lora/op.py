"""``lora_linear``: argument checks, the autograd Function, the public function.

A call travels one way: ``lora_linear`` → checks → ``LoRALinearFunction`` → ``dispatch`` → the
chosen backend's launcher.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import checks, rng
from peft_kernels.core.library import eager_apply, once_differentiable, traced_apply
from peft_kernels.core.operands import arrived, gradient_of, wide_dtype
from peft_kernels.lora.dispatch import LORA_LINEAR, LoRASpec, lora_backward, lora_forward


class LoRALinearFunction(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ, its gradients written out.

    Saved for backward: the parameters as they were given, the seed, s [M, r], and x where A or the
    weight is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scale: float | Tensor,
        dropout_p: float,
        backend: str | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return y [..., N] in ``dtype``, the one that is computed in."""
        *leading, _ = x.shape
        like = x if x.dtype is dtype else x.new_empty(0, dtype=dtype)
        # Sizes one by one: a tuple of them costs half as much again.
        y = like.new_empty(*leading, weight.shape[0])
        s = like.new_empty(math.prod(leading), lora_a.shape[0])
        lora_forward(x, weight, lora_a, lora_b, bias, seed, scale, dropout_p, backend, y, s)
        scale_tensor = scale if isinstance(scale, Tensor) else None
        needed = ctx.needs_input_grad
        kept = x if needed[2] or needed[1] else None
        ctx.save_for_backward(kept, weight, lora_a, lora_b, s, seed, scale_tensor)
        bias_dtype = None if bias is None else bias.dtype
        shape = x.shape, x.dtype
        number = None if scale_tensor is not None else scale
        ctx.options = number, dropout_p, backend, bias_dtype, shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, lora_a, lora_b and bias, each where it is needed."""
        if dy is None:
            return (None,) * 10
        dy = arrived(dy)
        x, weight, lora_a, lora_b, s, seed, scale = ctx.saved_tensors
        number, dropout_p, backend, bias_dtype, (shape, dtype) = ctx.options
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        if x is None:
            x = s.new_empty(shape[-1]).expand(shape)  # of that shape, and never read
        dx = dy.new_empty(shape, dtype=dtype) if need_x else None
        dweight = gradient_of(weight) if need_weight else None
        da = gradient_of(lora_a) if need_a else None
        db = gradient_of(lora_b) if need_b else None
        dbias = dy.new_empty(weight.shape[0], dtype=bias_dtype) if need_bias else None
        lora_backward(
            dy, x, s, weight, lora_a, lora_b, seed, number if scale is None else scale, dropout_p,
            backend, dx, da, db, dbias, dweight,
        )  # fmt: skip
        return dx, dweight, da, db, dbias, None, None, None, None, None


_apply = eager_apply(LoRALinearFunction)
_traced_apply = traced_apply(LoRALinearFunction)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ``, differentiable in all five tensors.

    What is computed in: the dtype of x, or the autocast dtype where autocast is on. Adapters (and
    the bias) may be kept wider, as peft keeps them in float32: they are cast down for the product,
    x is never cast up, and their gradients come back in their own dtype. peft without autocast
    casts x up instead and computes the low-rank part in float32; the two differ by the rounding of
    A, B and s to the dtype of x.

    Dropout acts on the input of A only, regenerated in backward from ``seed``; nothing of the size
    of x or y is stored. Backward saves s = scale · drop(x) Aᵀ, [M, r], and x itself, not even that
    where neither A nor the weight is trained.

    Args:
        x: activations [..., K]; float64, float32, float16 or bfloat16, any strides, 0 rows allowed.
        weight: base weight [N, K], usually frozen, in x's dtype (any float dtype under autocast).
        lora_a: down-projection A [r, K], in x's dtype or a wider one.
        lora_b: up-projection B [N, r], likewise.
        bias: base bias [N] or None, likewise.
        scale: alpha / r (alpha / sqrt(r) for rsLoRA); a new value compiles nothing anew. Or a
            float32 tensor of one element on x's device, which the kernels read when they run and
            which gets no gradient: for compiled graphs whose adapters are swapped.
        dropout_p: drop probability in [0, 1).
        training: dropout is the identity when False.
        seed: int64 tensor of one element on x's device that fixes the dropout mask, the same on
            every backend; None draws one from torch's generator.
        backend: "triton", "cuda", "cpp" or "reference" to demand one; None takes the best.

    Returns:
        y [..., N] in the dtype that is computed in.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or dtypes that cannot mix.
        ValueError: shapes or ranks that disagree, devices that differ, dropout outside [0, 1), an
            unknown backend.
        BackendUnavailable: a demanded backend cannot serve this call, with every reason.

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022.

    Example:
        >>> import torch
        >>> from peft_kernels import lora_linear
        >>> x, weight = torch.randn(2, 5, 32), torch.randn(16, 32)
        >>> lora_a, lora_b = torch.randn(8, 32, requires_grad=True), torch.zeros(16, 8)
        >>> lora_linear(x, weight, lora_a, lora_b, scale=2.0).shape
        torch.Size([2, 5, 16])
    """
    dtype, autocast = check_tensors(x, weight, lora_a, lora_b, bias)
    # One call for a number: this is in the way of every small call.
    factor = (
        checks.check_run_time_scale("scale", scale, x)
        if isinstance(scale, Tensor)
        else checks.check_scale("scale", scale)
    )
    probability = 0.0
    if training and dropout_p != 0.0:
        probability = checks.check_probability("dropout_p", dropout_p)
    if backend is not None:
        backends.check_backend_name(backend)
    if probability == 0.0:
        seed = None
    else:
        seed = rng.draw_seed(x.device) if seed is None else checks.check_seed(seed, x.device)
    # A tensor while tracing: a float would compile one graph per value.
    apply: Callable[..., Tensor] = _apply
    run_scale = factor
    if torch.compiler.is_compiling():
        apply = _traced_apply
        if not isinstance(factor, Tensor):
            run_scale = torch.full((), factor, dtype=wide_dtype(dtype), device=x.device)
    arguments = (x, weight, lora_a, lora_b, bias, seed, run_scale, probability, backend, dtype)
    if not autocast:
        return apply(*arguments)
    with torch.autocast(x.device.type, enabled=False):
        return apply(*arguments)


class Names(NamedTuple):
    """What the errors call the parameters of a projection."""

    weight: str = "weight"
    lora_a: str = "lora_a"
    lora_b: str = "lora_b"
    bias: str = "bias"


_NAMES = Names()


def check_tensors(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    names: Names = _NAMES,
) -> tuple[torch.dtype, bool]:
    """Check the tensors of a call; return the dtype to compute in and whether autocast is on."""
    # Of these the bias alone may be None.
    missing = weight is None or lora_a is None or lora_b is None
    uniform = not missing and checks.uniform(x, weight, lora_a, lora_b, bias)
    if not uniform:
        checks.check_tensor("x", x)
        checks.check_tensor(names.weight, weight)
        checks.check_tensor(names.lora_a, lora_a)
        checks.check_tensor(names.lora_b, lora_b)
        if bias is not None:
            checks.check_tensor(names.bias, bias)
    _check_shapes(x, weight, lora_a, lora_b, bias, names)
    autocast = checks.autocast_enabled(x.device)
    if uniform and not autocast:
        return x.dtype, False
    named = dict(zip(names, (weight, lora_a, lora_b, bias), strict=True))
    checks.check_same_device(named, x.device)
    return checks.compute_dtype(x, named, exact=(names.weight,)), autocast


def _check_shapes(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, names: Names
) -> None:
    shape, weight_shape, a_shape, b_shape = x.shape, weight.shape, lora_a.shape, lora_b.shape
    if not shape:
        raise ValueError("x must have shape [..., K], got a 0-d tensor")
    if not len(weight_shape) == len(a_shape) == len(b_shape) == 2:
        checks.check_ndim(names.weight, weight, 2, "[N, K]")
        checks.check_ndim(names.lora_a, lora_a, 2, "[r, K]")
        checks.check_ndim(names.lora_b, lora_b, 2, "[N, r]")
    out_features, in_features = weight_shape
    rank, down_features = a_shape
    if shape[-1] != in_features:
        raise ValueError(
            f"x must have shape [..., {in_features}] to fit {names.weight} {list(weight.shape)}, "
            f"got {list(x.shape)}"
        )
    if rank == 0:
        raise ValueError(f"{names.lora_a} must have a rank of at least 1, got shape [0, K]")
    if down_features != in_features:
        raise ValueError(
            f"{names.lora_a} must have shape [r, {in_features}] to fit {names.weight} "
            f"{list(weight.shape)}, got {list(lora_a.shape)}"
        )
    if b_shape != (out_features, rank):
        raise ValueError(
            f"{names.lora_b} must have shape [{out_features}, {rank}] to fit {names.weight} "
            f"{list(weight.shape)} and {names.lora_a} {list(lora_a.shape)}, "
            f"got {list(lora_b.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{names.bias} must have shape [{out_features}], got {list(bias.shape)}")


def explain_call(*args: Any, **kwargs: Any) -> tuple[backends.Op, LoRASpec, str | None]:
    """Return what decides the backend of ``lora_linear(*args, **kwargs)``, checked alike."""
    bound = inspect.signature(lora_linear).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    x, weight, lora_a = given["x"], given["weight"], given["lora_a"]
    dtype, _ = check_tensors(x, weight, lora_a, given["lora_b"], given["bias"])
    checks.check_run_time_scale("scale", given["scale"], x)
    checks.check_probability("dropout_p", given["dropout_p"])
    backends.check_backend_name(given["backend"])
    dropout = given["training"] and given["dropout_p"] > 0.0
    (out_features, in_features), tokens = weight.shape, math.prod(x.shape[:-1])
    spec = LoRASpec(x.device, dtype, tokens, in_features, out_features, lora_a.shape[0], dropout)
    return LORA_LINEAR, spec, given["backend"]


backends.explains(lora_linear, explain_call)
