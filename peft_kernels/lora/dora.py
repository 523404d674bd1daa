"""``dora_linear``: LoRA whose weight keeps a trained norm in each of its rows.

With g = magnitude / norm, norm [N] that of the rows of V = W + scale B A, held constant:

    p = 0    z = x Wᵀ + scale x Aᵀ Bᵀ                            y = bias + g z
    p > 0    u = x Wᵀ + bias + scale drop(x) Aᵀ (g B)ᵀ           y = u + (g - 1) drop(x) Wᵀ

The second line is what peft computes: dropout acts on all but the base's own output. V is never
made: |V|² = |W|² + 2 scale <W, B A> + scale² |B A|², row by row, where <W, B A> is Σ_r B ∘ W Aᵀ and
|B A|² is Σ_r B ∘ B (A Aᵀ). Saved for backward beside what ``lora_linear`` saves: z or drop(x) Wᵀ,
where the magnitude is trained, and g.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels.core import backend as backends
from peft_kernels.core import checks, rng
from peft_kernels.core.library import once_differentiable, out_variant_op
from peft_kernels.core.operands import wide_dtype
from peft_kernels.lora import op
from peft_kernels.lora.dispatch import LoRASpec
from peft_kernels.lora.dropout import drop

# Elements of a 16-bit tensor that are widened at a time, 16 MiB of float32.
_CHUNK = 1 << 22


def _rows_at_a_time(value: Tensor) -> int:
    return max(1, _CHUNK // max(1, value.shape[1]))


def run_norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor, norm: Tensor
) -> None:
    """Write the norm [N] of the rows of W + scale B A, in float32 or float64 throughout."""
    dtype = norm.dtype
    with torch.no_grad(), checks.without_autocast(weight.device):
        a, b = lora_a.detach().to(dtype), lora_b.detach().to(dtype)
        gram = a @ a.t()  # [r, r]
        whole = weight.dtype == dtype
        step = max(1, weight.shape[0]) if whole else _rows_at_a_time(weight)
        for rows, up, out in zip(
            weight.detach().split(step), b.split(step), norm.split(step), strict=True
        ):
            wide = rows.to(dtype)
            squared = torch.linalg.vector_norm(wide, dim=1).square()
            low_rank = 2.0 * (wide @ a.t()) + scale * (up @ gram)  # [rows, r]
            squared += scale * (low_rank * up).sum(1)
            # Rounding may leave a norm of about zero below it.
            torch.sqrt(squared.clamp_(min=0.0), out=out)


_norm = out_variant_op(
    "dora_norm",
    run_norm,
    "(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale, Tensor(a!) norm) -> ()",
    ("norm",),
)


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return the norm [N] of the rows of W + scale B A, a constant to autograd.

    One read of W; in float32 (float64 for float64) whatever the dtypes. It is made anew for every
    call: peft merges through ``weight.data``, FSDP gathers in place, and neither leaves a trace by
    which a stored norm of W could be told from one of another weight.
    """
    norm = weight.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype))
    run_scale: float | Tensor = scale
    if torch.compiler.is_compiling():
        run_scale = torch.full((), scale, dtype=norm.dtype, device=weight.device)
    _norm(weight, lora_a, lora_b, run_scale, norm)
    return norm


def run_scaled(values: Tensor, factor: Tensor, added: Tensor | None, y: Tensor) -> None:
    """Write y = added + factor values [..., N], rounded once; added [N], [..., N] or None."""
    if added is None:
        torch.mul(values, factor, out=y)
    else:
        torch.addcmul(added, values, factor, out=y)


def run_scaled_backward(
    dy: Tensor,
    values: Tensor | None,
    factor: Tensor,
    dvalues: Tensor | None,
    dfactor: Tensor | None,
) -> None:
    """Write the gradients that are not None from dy [..., N]."""
    if dvalues is not None:
        torch.mul(dy, factor, out=dvalues)
    if dfactor is not None:
        assert values is not None
        width = factor.shape[0]
        step = _rows_at_a_time(factor.view(1, width))
        dfactor.zero_()
        rows = dy.reshape(-1, width).split(step), values.reshape(-1, width).split(step)
        for dy_rows, value_rows in zip(*rows, strict=True):
            dfactor += (dy_rows.to(dfactor.dtype) * value_rows).sum(0)


_scaled = out_variant_op(
    "dora_scaled",
    run_scaled,
    "(Tensor values, Tensor factor, Tensor? added, Tensor(a!) y) -> ()",
    ("y",),
)
_scaled_backward = out_variant_op(
    "dora_scaled_backward",
    run_scaled_backward,
    "(Tensor dy, Tensor? values, Tensor factor, Tensor(a!)? dvalues, Tensor(b!)? dfactor) -> ()",
    ("dvalues", "dfactor"),
)


class ScaledFunction(torch.autograd.Function):
    """y = added + factor values, a factor for each column, its gradients written out.

    Saved for backward: the factor, and the values where the factor is trained. y is not.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor, added: Tensor | None) -> Tensor:
        """Return y [..., N] in the dtype of the values; the factor [N] may be wider."""
        y = values.new_empty(values.shape)
        _scaled(values, factor, added, y)
        ctx.save_for_backward(factor, values if ctx.needs_input_grad[1] else None)
        ctx.added = None if added is None else (added.dim(), added.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of values, factor and added, each where it is needed."""
        if dy is None:
            return None, None, None
        factor, values = ctx.saved_tensors
        need_values, need_factor, need_added = ctx.needs_input_grad
        dvalues = dy.new_empty(dy.shape) if need_values else None
        dfactor = torch.empty_like(factor) if need_factor else None
        _scaled_backward(dy, values, factor, dvalues, dfactor)
        dadded = dy
        if need_added and ctx.added[0] == 1:
            tokens = tuple(range(dy.dim() - 1))
            dadded = dy.sum(tokens, dtype=wide_dtype(dy.dtype)) if tokens else dy
        return dvalues, dfactor, dadded.to(ctx.added[1]) if need_added else None


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``magnitude / |W + scale B A| · (x Wᵀ + scale · x Aᵀ Bᵀ) + bias``, differentiable.

    |·| is the norm of each row. It follows W, A and B but is a constant to the gradients, as in
    section 4.3 of the paper and in peft. It is made of W Aᵀ and A Aᵀ, never of a dense W + B A, in
    float32 (float64 for float64) whatever the dtypes; where W + scale B A nearly vanishes beside W,
    that costs the digits that cancel.

    With dropout it is peft's form, ``x Wᵀ + bias + (g - 1) · drop(x) Wᵀ + g · scale · drop(x) Aᵀ
    Bᵀ`` with g = magnitude / norm: drop(x) enters both products under one mask, regenerated in
    backward from ``seed``. Backward saves what ``lora_linear`` saves, and beside it one tensor of
    the size of y where the magnitude is trained.

    Args:
        x: activations [..., K]; float64, float32, float16 or bfloat16, any strides, 0 rows allowed.
        weight: base weight [N, K], usually frozen, in x's dtype (any float dtype under autocast).
        lora_a: down-projection A [r, K], in x's dtype or a wider one.
        lora_b: up-projection B [N, r], likewise.
        magnitude: the norm that each row is given [N], likewise; starts from the rows' own.
        bias: base bias [N] or None, likewise.
        scale: alpha / r (alpha / sqrt(r) for rsLoRA); a new value compiles nothing anew.
        dropout_p: drop probability in [0, 1).
        training: dropout is the identity when False.
        seed: int64 tensor of one element on x's device that fixes the dropout mask, the same on
            every backend; None draws one from torch's generator.
        backend: of ``lora_linear``: "triton", "cuda", "cpp" or "reference" to demand one; None
            takes the best.

    Returns:
        y [..., N] in the dtype that is computed in.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or dtypes that cannot mix.
        ValueError: shapes or ranks that disagree, devices that differ, dropout outside [0, 1), an
            unknown backend.
        BackendUnavailable: a demanded backend cannot serve this call, with every reason.

    Source: Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, ICML 2024.

    Example:
        >>> import torch
        >>> from peft_kernels import dora_linear
        >>> x, weight = torch.randn(2, 5, 32), torch.randn(16, 32)
        >>> lora_a, lora_b = torch.randn(8, 32), torch.zeros(16, 8)
        >>> magnitude = weight.norm(dim=1).requires_grad_()
        >>> y = dora_linear(x, weight, lora_a, lora_b, magnitude, scale=2.0)
        >>> torch.allclose(y, x @ weight.t(), atol=1e-5)
        True
    """
    dtype = _check(x, weight, lora_a, lora_b, magnitude, bias)
    factor = checks.check_scale("scale", scale)
    probability = 0.0
    if training and dropout_p != 0.0:
        probability = checks.check_probability("dropout_p", dropout_p)
    g = magnitude.to(wide_dtype(dtype)) / dora_norm(weight, lora_a, lora_b, factor)
    if probability == 0.0:
        z = op.lora_linear(x, weight, lora_a, lora_b, scale=factor, backend=backend)
        return ScaledFunction.apply(z, g, bias)
    seed = rng.draw_seed(x.device) if seed is None else checks.check_seed(seed, x.device)
    u = op.lora_linear(
        x, weight, lora_a, g.unsqueeze(1) * lora_b, bias,
        scale=factor, dropout_p=probability, seed=seed, backend=backend,
    )  # fmt: skip
    return ScaledFunction.apply(F.linear(drop(x.to(dtype), seed, probability), weight), g - 1.0, u)


def _check(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
) -> torch.dtype:
    """Check the tensors of a call; return the dtype to compute in."""
    dtype, _ = op.check_tensors(x, weight, lora_a, lora_b, bias)
    checks.check_tensor("magnitude", magnitude)
    if magnitude.shape != (weight.shape[0],):
        raise ValueError(
            f"magnitude must have shape [{weight.shape[0]}] to fit weight {list(weight.shape)}, "
            f"got {list(magnitude.shape)}"
        )
    checks.check_same_device({"magnitude": magnitude}, x.device)
    checks.compute_dtype(x, {"magnitude": magnitude}, exact=())
    return dtype


def explain_call(*args: Any, **kwargs: Any) -> tuple[backends.Op, LoRASpec, str | None]:
    """Return what decides the backend of ``dora_linear(*args, **kwargs)``, checked alike."""
    bound = inspect.signature(dora_linear).bind(*args, **kwargs)
    given = bound.arguments
    names = ("x", "weight", "lora_a", "lora_b", "magnitude", "bias")
    tensors: dict[str, Any] = {name: given.get(name) for name in names}
    _check(**tensors)
    del given["magnitude"]
    return op.explain_call(**given)


backends.explains(dora_linear, explain_call)
