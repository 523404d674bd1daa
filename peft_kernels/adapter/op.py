"""``adapter``: argument checks, the autograd Function, the public function.

A call travels one way: ``adapter`` → checks → ``AdapterFunction`` → ``dispatch`` → the chosen
backend's launcher.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from peft_kernels.adapter import check
from peft_kernels.adapter.activations import check_activation
from peft_kernels.adapter.dispatch import ADAPTER, AdapterSpec, adapter_backward, adapter_forward
from peft_kernels.core import backend as backends
from peft_kernels.core import checks, rng
from peft_kernels.core.library import eager_apply, once_differentiable, traced_apply
from peft_kernels.core.operands import arrived, gradient_of, wide_dtype


class AdapterFunction(torch.autograd.Function):
    """y = residual + scale · drop(act(x downᵀ + b_down) upᵀ + b_up), its gradients written out.

    Saved for backward: x and the parameters as they were given, the seed, and pre [M, r].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor | None,
        up_bias: Tensor | None,
        residual: Tensor | None,
        scale: float | Tensor,
        input_residual: bool,
        activation: str,
        seed: Tensor | None,
        dropout_p: float,
        backend: str | None,
        index: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return y [..., D] in ``dtype``, the one that is computed in."""
        shape = x.shape
        like = x if x.dtype is dtype else x.new_empty(0, dtype=dtype)
        # Sizes one by one: a tuple of them costs half as much again.
        y = like.new_empty(*shape)
        pre = like.new_empty(math.prod(shape[:-1]), down.shape[-2])
        adapter_forward(
            x, down, up, down_bias, up_bias, residual, input_residual, scale, activation, seed,
            dropout_p, backend, index, y, pre,
        )  # fmt: skip
        scale_tensor = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(x, down, up, down_bias, up_bias, pre, seed, scale_tensor, index)
        ctx.options = (
            None if scale_tensor is not None else scale, activation, dropout_p, backend,
            input_residual, None if residual is None else residual.dtype,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the seven tensors, each where it is needed."""
        if dy is None:
            return (None,) * 14
        dy = arrived(dy)
        x, down, up, down_bias, up_bias, pre, seed, scale, index = ctx.saved_tensors
        number, activation, dropout_p, backend, input_residual, residual_dtype = ctx.options
        need_x, need_down, need_up, need_b1, need_b2, need_residual, need_scale = (
            ctx.needs_input_grad[:7]
        )
        dx = gradient_of(x) if need_x else None
        d_down = gradient_of(down) if need_down else None
        d_up = gradient_of(up) if need_up else None
        d_down_bias = gradient_of(down_bias) if need_b1 else None
        d_up_bias = gradient_of(up_bias) if need_b2 else None
        d_scale = None
        if need_scale:
            d_scale = scale.new_empty(scale.numel(), dtype=wide_dtype(pre.dtype))
        # Only the residual, a tensor of its own, may be what is trained below.
        if need_x or need_down or need_up or need_b1 or need_b2 or need_scale:
            adapter_backward(
                dy, x, pre, down, up, down_bias, up_bias, number if scale is None else scale,
                activation, seed, dropout_p, backend, index, input_residual,
                dx, d_down, d_up, d_down_bias, d_up_bias, d_scale,
            )  # fmt: skip
        if d_scale is not None:
            d_scale = d_scale.to(scale.dtype).view(scale.shape)
        # The residual is added as it is: its gradient is dy, not a copy of it.
        d_residual = dy.to(residual_dtype) if need_residual else None
        return (
            dx, d_down, d_up, d_down_bias, d_up_bias, d_residual, d_scale,
            None, None, None, None, None, None, None,
        )  # fmt: skip


_apply = eager_apply(AdapterFunction)
_traced_apply = traced_apply(AdapterFunction)


def adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | Literal["input"] | None = "input",
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``residual + scale · drop(act(x W_downᵀ + b_down) W_upᵀ + b_up)``, differentiable.

    What is computed in: the dtype of x, or the autocast dtype where autocast is on (y comes in
    it too). Parameters may be kept wider: they are cast down for the products, x is never cast up,
    and their gradients come back in their own dtype.

    Dropout acts on the branch before the residual is added, regenerated in backward from ``seed``.
    Backward saves x itself and the pre-activations, [M, r]; nothing else of the size of x.

    Args:
        x: activations [..., D]; float64, float32, float16 or bfloat16, any strides, 0 rows allowed.
        down_weight: [r, D], in x's dtype or a wider one; any r of at least 1.
        up_weight: [D, r], likewise.
        down_bias: [r] or None, likewise.
        up_bias: [D] or None, likewise.
        activation: "relu", "gelu" (erf), "gelu_tanh", "quick_gelu" (x · sigmoid(1.702 x)), "silu",
            "tanh", "sigmoid", "leaky_relu" (0.01), "relu6", "mish" or "identity".
        scale: a number (a new value compiles nothing anew), a 0-d tensor, or a tensor [D] with one
            number for each feature; tensors get gradients.
        residual: "input" adds x itself, a tensor of x's shape and dtype is added instead (the
            parallel adapter) and gets its gradient, None adds nothing.
        dropout_p: drop probability in [0, 1).
        training: dropout is the identity when False.
        seed: int64 tensor of one element on x's device that fixes the dropout mask, the same on
            every backend; None draws one from torch's generator.
        backend: "triton", "cuda", "cpp" or "reference" to demand one; None takes the best.

    Returns:
        y [..., D] in the dtype that is computed in.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or dtypes that cannot mix.
        ValueError: shapes that disagree, devices that differ, an unknown activation, residual or
            backend, dropout outside [0, 1).
        BackendUnavailable: a demanded backend cannot serve this call, with every reason.

    Source: Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, ICML 2019; the
    parallel form: He et al., *Towards a Unified View of Parameter-Efficient Transfer Learning*,
    ICLR 2022.

    Example:
        >>> import torch
        >>> from peft_kernels import adapter
        >>> x = torch.randn(2, 5, 32)
        >>> down, up = torch.randn(4, 32, requires_grad=True), torch.zeros(32, 4)
        >>> y = adapter(x, down, up, activation="gelu")
        >>> torch.equal(y, x)
        True
    """
    own_residual, factor, probability, dtype = _check(
        x, down_weight, up_weight, down_bias, up_bias, activation, scale, residual,
        dropout_p, backend,
    )  # fmt: skip
    return call(
        (x, down_weight, up_weight, down_bias, up_bias, own_residual, factor),
        isinstance(residual, str), activation, probability if training else 0.0, seed, backend,
        None, dtype,
    )  # fmt: skip


def call(
    tensors: tuple[Any, ...],
    input_residual: bool,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    index: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run a call that has been checked, of one adapter or, with ``index``, of many.

    Args:
        tensors: x, the four parameters, the residual of its own, and the scale.
        input_residual: whether x is the residual.
        activation: its name.
        dropout_p: 0 for no dropout.
        seed: of the dropout, or None to draw one.
        backend: a demand, or None.
        index: int64 [M], the adapter of every row, or None.
        dtype: the dtype to compute in.
    """
    *others, factor = tensors
    device = others[0].device
    if dropout_p == 0.0:
        seed = None
    else:
        seed = rng.draw_seed(device) if seed is None else checks.check_seed(seed, device)
    # A tensor while tracing: a float would compile one graph per value.
    apply: Callable[..., Tensor] = _apply
    if torch.compiler.is_compiling():
        apply = _traced_apply
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, dtype=wide_dtype(dtype), device=device)
    arguments = (
        *others, factor, input_residual, activation, seed, dropout_p, backend, index, dtype,
    )  # fmt: skip
    if not checks.autocast_enabled(device):
        return apply(*arguments)
    with torch.autocast(device.type, enabled=False):
        return apply(*arguments)


def _check(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    scale: float | Tensor,
    residual: Tensor | str | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor | None, float | Tensor, float, torch.dtype]:
    """Check a call; return the residual of its own, the scale, the probability and the dtype."""
    plain = check.check_weights(x, down_weight, up_weight, down_bias, up_bias)
    check_activation(activation)
    own_residual = check.check_residual(residual, x)
    factor = check.check_scale(scale, x.shape[-1], x.device)
    probability = checks.check_probability("dropout_p", dropout_p)
    backends.check_backend_name(backend)
    if plain and own_residual is None and not checks.autocast_enabled(x.device):
        return None, factor, probability, x.dtype
    dtype = check.check_dtypes(
        x, own_residual, down_weight=down_weight, up_weight=up_weight, down_bias=down_bias,
        up_bias=up_bias,
    )  # fmt: skip
    return own_residual, factor, probability, dtype


def explain_call(*args: Any, **kwargs: Any) -> tuple[backends.Op, AdapterSpec, str | None]:
    """Return what decides the backend of ``adapter(*args, **kwargs)``, checked alike."""
    bound = inspect.signature(adapter).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    training = given.pop("training")
    given.pop("seed")
    *_, probability, dtype = _check(**given)
    x, dropout = given["x"], training and probability > 0.0
    bottleneck, features = given["down_weight"].shape
    tokens = math.prod(x.shape[:-1])
    spec = AdapterSpec(x.device, dtype, tokens, features, bottleneck, dropout)
    return ADAPTER, spec, given["backend"]


backends.explains(adapter, explain_call)
