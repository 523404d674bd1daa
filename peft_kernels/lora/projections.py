"""``lora_projections``: several LoRA layers of one x, as one op.

A call travels as ``lora_linear``'s: checks → ``LoRAProjectionsFunction`` →
``projections_dispatch`` → the chosen backend's launchers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import checks, rng
from peft_kernels.core.library import eager_apply, once_differentiable, traced_apply
from peft_kernels.core.operands import gradient_of, wide_dtype
from peft_kernels.lora import op
from peft_kernels.lora.projections_dispatch import (
    LORA_PROJECTIONS,
    ProjectionsSpec,
    lora_projections_backward,
    lora_projections_forward,
    one_layout,
)

# What each projection has among the Function's arguments, by kind: all weights, all A, all B, all
# biases, all seeds, all scales.
_KINDS = 6
_FIXED = 5  # arguments before them


class LoRAProjectionsFunction(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + biasᵢ + scaleᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ, the gradients written out, one dX.

    Saved for backward: the parameters as they were given, the seeds, every s [M, r], and x once,
    where an A or a weight is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        count: int,
        dropout_ps: tuple[float, ...],
        backend: str | None,
        dtype: torch.dtype,
        *given: Any,
    ) -> tuple[Tensor, ...]:
        """Return every y [..., N] in ``dtype``; ``given`` are the projections' tensors by kind."""
        # An output that nobody used has no gradient, and costs nothing in backward.
        ctx.set_materialize_grads(False)
        weights, lora_as, lora_bs, biases, seeds, scales = _by_kind(given, count)
        leading = x.shape[:-1]
        tokens = math.prod(leading)
        like = x if x.dtype is dtype else x.new_empty(0, dtype=dtype)
        ys = [like.new_empty(*leading, weight.shape[0]) for weight in weights]
        ss = [like.new_empty(tokens, lora_a.shape[0]) for lora_a in lora_as]
        lora_projections_forward(
            x, weights, lora_as, lora_bs, biases, seeds, scales, dropout_ps, backend, ys, ss
        )
        tensors = [scale if isinstance(scale, Tensor) else None for scale in scales]
        needs_x = True in ctx.needs_input_grad[_FIXED : _FIXED + 2 * count]
        kept = x if needs_x else None
        ctx.save_for_backward(kept, *weights, *lora_as, *lora_bs, *ss, *seeds, *tensors)
        numbers = [None if isinstance(scale, Tensor) else scale for scale in scales]
        bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.options = count, numbers, dropout_ps, backend, bias_dtypes, x.shape, x.dtype
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of every projection's parameters, where needed."""
        count, numbers, dropout_ps, backend, bias_dtypes, shape, dtype = ctx.options
        needed = ctx.needs_input_grad
        results: list[Tensor | None] = [None] * (_FIXED + _KINDS * count)
        x, *saved = ctx.saved_tensors
        weights, lora_as, lora_bs, ss, seeds, tensors = kinds = _by_kind(saved, count)
        used = [index for index, dy in enumerate(dys) if dy is not None]
        places: list[int] = []
        outputs: list[Tensor] = []
        if x is None:
            x = ss[0].new_empty(shape[-1]).expand(shape)  # of that shape, and never read
        if needed[0] and used:
            outputs.append(ss[0].new_empty(shape, dtype=dtype))
            places.append(0)
            results[0] = outputs[0]
        # In the order of dispatch's Gradients: those of A, B, bias and weight.
        for order, kind in enumerate((1, 2, 3, 0)):
            first = _FIXED + kind * count
            if True not in needed[first : first + count]:
                continue
            for position, index in enumerate(used):
                if not needed[first + index]:
                    continue
                if kind == 3:
                    size = weights[index].shape[0]
                    output = ss[index].new_empty(size, dtype=bias_dtypes[index])
                else:
                    output = gradient_of(kinds[kind][index])
                results[first + index] = output
                places.append(1 + order * len(used) + position)
                outputs.append(output)
        if not outputs:
            return tuple(results)
        scales = [tensors[i] if numbers[i] is None else numbers[i] for i in range(count)]
        given: list[Any] = [ss, weights, lora_as, lora_bs, seeds, scales, dropout_ps]
        if len(used) < count:
            given = [[each[index] for index in used] for each in given]
        ss, *others = given
        lora_projections_backward(
            [dy for dy in dys if dy is not None], x, ss, *others, backend, places, outputs
        )
        return tuple(results)


def _by_kind(values: Sequence[Any], count: int) -> list[list[Any]]:
    """Return lists of ``count`` values, one list for each kind."""
    return [list(values[first : first + count]) for first in range(0, len(values), count)]


_apply = eager_apply(LoRAProjectionsFunction)
_traced_apply = traced_apply(LoRAProjectionsFunction)


def lora_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scales: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    seeds: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Return ``x Wᵢᵀ + biasᵢ + scaleᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ`` for every i, as one differentiable op.

    For layers that read the same x: the query, key and value projections of attention, or gate and
    up of a gated MLP. Result i is what ``lora_linear`` of projection i gives under the same seed,
    dtypes and autocast likewise; the dropout masks are independent of each other. x is saved for
    backward once, and its gradient is one tensor: the sum over the projections is rounded once,
    where separate layers round every part and every sum.

    How it runs: Triton computes up to four projections per launch where its tile table has a
    grouped form, and dX of up to four in one launch; the factors' gradients take a launch for each
    projection. The other backends run one projection after the other. ``explain`` tells which.

    Args:
        x: activations [..., K]; float64, float32, float16 or bfloat16, any strides, 0 rows allowed.
        weights: base weights, each [N_i, K], usually frozen, in x's dtype (any under autocast); one
            or more.
        lora_as: down-projections A_i, each [r_i, K], in x's dtype or a wider one.
        lora_bs: up-projections B_i, each [N_i, r_i], likewise.
        biases: base biases, each [N_i] or None, likewise; None for no bias at all.
        scales: alpha / r, a number for all or one for each.
        dropout_p: drop probability in [0, 1), a number for all or one for each.
        training: dropout is the identity when False.
        seeds: one int64 tensor of one element for each projection, on x's device, that fix the
            dropout masks; None draws them all at once from torch's generator.
        backend: "triton", "cuda", "cpp" or "reference" to demand one; None takes the best.

    Returns:
        (y_1, ..., y_G), each [..., N_i] in the dtype that is computed in.

    Raises:
        TypeError: an argument is not what it should be, or dtypes that cannot mix.
        ValueError: lengths, shapes or ranks that disagree, devices that differ, dropout outside
            [0, 1), an unknown backend.
        BackendUnavailable: a demanded backend cannot serve this call, with every reason.

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022.

    Example:
        >>> import torch
        >>> from peft_kernels import lora_projections
        >>> x = torch.randn(2, 5, 32)
        >>> weights = torch.randn(48, 32), torch.randn(16, 32)
        >>> lora_as = torch.randn(8, 32), torch.randn(4, 32)
        >>> lora_bs = torch.zeros(48, 8), torch.zeros(16, 4)
        >>> query, key = lora_projections(x, weights, lora_as, lora_bs, scales=2.0)
        >>> query.shape, key.shape
        (torch.Size([2, 5, 48]), torch.Size([2, 5, 16]))
    """
    count = _length("weights", weights)
    _length("lora_as", lora_as, count)
    _length("lora_bs", lora_bs, count)
    if biases is None:
        biases = [None] * count
    _length("biases", biases, count)
    dtype, autocast = _check(x, weights, lora_as, lora_bs, biases)
    factors: list[Any] = _each("scales", scales, count, checks.check_scale)
    probabilities = _each("dropout_p", dropout_p, count, checks.check_probability)
    if backend is not None:
        backends.check_backend_name(backend)
    if not training:
        probabilities = [0.0] * count
    run_seeds = _seeds(seeds, probabilities, x.device)
    apply: Callable[..., tuple[Tensor, ...]] = _apply
    # Tensors while tracing: a float would compile one graph per value.
    if torch.compiler.is_compiling():
        apply = _traced_apply
        factors = [
            torch.full((), factor, dtype=wide_dtype(dtype), device=x.device) for factor in factors
        ]
    fixed = (x, count, tuple(probabilities), backend, dtype)
    arguments = (*fixed, *weights, *lora_as, *lora_bs, *biases, *run_seeds, *factors)
    if not autocast:
        return apply(*arguments)
    with torch.autocast(x.device.type, enabled=False):
        return apply(*arguments)


def _length(name: str, values: object, count: int | None = None) -> int:
    """Return how many values a sequence has: at least one, and ``count`` where that is given."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{name} must be a list or tuple with one entry for each projection, "
            f"got {checks.describe(values)}"
        )
    if count is None and not values:
        raise ValueError(f"{name} must have at least one entry, got none")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} must have {count} entries, as many as weights, got {len(values)}")
    return len(values)


def _each(
    name: str, value: object, count: int, check: Callable[[str, object], float]
) -> list[float]:
    """Return one checked number for each projection."""
    if not isinstance(value, (list, tuple)):
        return [check(name, value)] * count
    _length(name, value, count)
    return [check(f"{name}[{index}]", each) for index, each in enumerate(value)]


def _seeds(
    seeds: object, probabilities: Sequence[float], device: torch.device
) -> list[Tensor | None]:
    """Return a seed for each projection under dropout; what is not given is drawn at once."""
    if seeds is not None:
        _length("seeds", seeds, len(probabilities))
    dropped = [index for index, p in enumerate(probabilities) if p > 0.0]
    found: list[Tensor | None] = [None] * len(probabilities)
    if seeds is None and dropped:
        for index, seed in zip(dropped, rng.draw_seed(device, len(dropped)).split(1), strict=True):
            found[index] = seed
    elif isinstance(seeds, (list, tuple)):
        for index in dropped:
            found[index] = checks.check_seed(seeds[index], device, f"seeds[{index}]")
    return found


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[torch.dtype, bool]:
    """Check the tensors of a call; return the dtype to compute in and whether autocast is on."""
    for index, tensors in enumerate(zip(weights, lora_as, lora_bs, biases, strict=True)):
        names = _NAMES[index] if index < len(_NAMES) else _names(index)
        found = op.check_tensors(x, *tensors, names)
    return found


def _names(index: int) -> op.Names:
    """Return what the errors call the parameters of projection ``index``."""
    return op.Names(*[f"{kind}[{index}]" for kind in ("weights", "lora_as", "lora_bs", "biases")])


# Of the first ones, made once: they are needed for errors alone.
_NAMES = tuple(map(_names, range(8)))


def explain_call(*args: Any, **kwargs: Any) -> tuple[backends.Op, ProjectionsSpec, str | None]:
    """Return what decides the backend of ``lora_projections(*args, **kwargs)``, checked alike."""
    bound = inspect.signature(lora_projections).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    x, weights, lora_as, lora_bs = (given[name] for name in ("x", "weights", "lora_as", "lora_bs"))
    count = _length("weights", weights)
    biases = [None] * count if given["biases"] is None else given["biases"]
    for name, values in (("lora_as", lora_as), ("lora_bs", lora_bs), ("biases", biases)):
        _length(name, values, count)
    dtype, _ = _check(x, weights, lora_as, lora_bs, biases)
    _each("scales", given["scales"], count, checks.check_scale)
    probabilities = _each("dropout_p", given["dropout_p"], count, checks.check_probability)
    backends.check_backend_name(given["backend"])
    spec = ProjectionsSpec(
        x.device,
        dtype,
        math.prod(x.shape[:-1]),
        x.shape[-1],
        tuple(weight.shape[0] for weight in weights),
        tuple(lora_a.shape[0] for lora_a in lora_as),
        tuple(given["training"] and p > 0.0 for p in probabilities),
        one_layout(weights),
    )
    return LORA_PROJECTIONS, spec, given["backend"]


backends.explains(lora_projections, explain_call)
