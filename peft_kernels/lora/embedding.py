"""``lora_embedding``: rows of a table and their low-rank update, in two gathers and one product.

With ``ids`` [M] and the columns of A that they name, ``low = A[:, ids]ᵀ`` [M, r]:

    y     = E[ids] + scale · low Bᵀ               added in the product, rounded once
    dlow  = scale · dy B,   dA[:, v] = Σ_{ids = v} dlow
    dB    = scale · dyᵀ low,   dE[v] = Σ_{ids = v} dy     only where the table is trained

Saved for backward: ``ids``, low and B. Gathers and products are the library's on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_kernels.core import checks
from peft_kernels.core.library import eager_apply, once_differentiable, traced_apply
from peft_kernels.core.operands import wide_dtype

_INTEGERS = (torch.int64, torch.int32)


class LoRAEmbeddingFunction(torch.autograd.Function):
    """y = E[ids] + scale · A[:, ids]ᵀ Bᵀ, its gradients written out."""

    @staticmethod
    def forward(
        ctx: Any,
        input_ids: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float | Tensor,
        padding_idx: int,
    ) -> Tensor:
        """Return y [..., D] in the dtype of the table."""
        ids = input_ids.reshape(-1)
        # Not index_select, which compiled code counts from the end below zero.
        y = torch.embedding(weight, ids)  # [M, D]
        low = torch.embedding(lora_a.t(), ids).to(weight.dtype)  # [M, r]
        up = lora_b.to(weight.dtype).t()
        if isinstance(scale, Tensor):
            y.addmm_((low * scale).to(low.dtype), up)
        else:
            y.addmm_(low, up, alpha=scale)
        scale_tensor = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(ids, low, lora_b, scale_tensor)
        number = None if scale_tensor is not None else scale
        ctx.options = number, padding_idx, weight.shape[0], lora_a.dtype
        return y.view(*input_ids.shape, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the table, A and B, each where it is needed."""
        if dy is None:
            return (None,) * 6
        ids, low, lora_b, scale = ctx.saved_tensors
        number, padding_idx, rows, a_dtype = ctx.options
        factor = number if scale is None else scale
        _, need_weight, need_a, need_b = ctx.needs_input_grad[:4]
        dy = dy.reshape(-1, dy.shape[-1])
        dweight = da = db = None
        if need_weight:
            dweight = _scattered(dy, ids, rows, padding_idx)
        # Autocast may be on where backward is called, whatever it was in forward.
        with checks.without_autocast(dy.device):
            if need_a:
                dlow = (dy @ lora_b.to(dy.dtype)).to(wide_dtype(a_dtype)) * factor  # [M, r]
                da = _scattered(dlow, ids, rows, padding_idx).t().to(a_dtype)
            if need_b:
                db = (dy.t() @ low).to(wide_dtype(lora_b.dtype)).mul_(factor).to(lora_b.dtype)
        return None, dweight, da, db, None, None


def _scattered(values: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """Return the gradient of a table of that many rows, as ``F.embedding`` makes it."""
    return torch.ops.aten.embedding_dense_backward(values, ids, rows, padding_idx, False)


_apply = eager_apply(LoRAEmbeddingFunction)
_traced_apply = traced_apply(LoRAEmbeddingFunction)


def lora_embedding(
    input_ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """Return ``E[ids] + scale · A[:, ids]ᵀ Bᵀ``: an embedding with LoRA, differentiable in E, A, B.

    Computed in the dtype of the table, under autocast too, as ``F.embedding`` is. A and B may be
    kept wider, as peft keeps them in float32: they are cast down for the product, and their
    gradients come back in their own dtype. What is added is rounded once, with the row.

    Args:
        input_ids: token ids, any shape, int64 or int32, in 0..V - 1; may be empty.
        weight: embedding table E [V, D], usually frozen; any float dtype.
        lora_a: A [r, V], in the table's dtype or a wider one.
        lora_b: B [D, r], likewise.
        scale: alpha / r (alpha / sqrt(r) for rsLoRA); a new value compiles nothing anew. Or a
            float32 tensor of one element on the table's device, without a gradient.
        padding_idx: row of E, and column of A, that get no gradient, as in ``nn.Embedding``; None
            for none.

    Returns:
        y [..., D] in the dtype of the table.

    Raises:
        TypeError: an argument is not a dense tensor of an allowed dtype, or dtypes that cannot mix.
        ValueError: shapes or ranks that disagree, devices that differ, a padding row outside the
            table.
        IndexError: an id outside the table (on a CPU; a GPU stops with an assertion of its own).

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022.

    Example:
        >>> import torch
        >>> from peft_kernels import lora_embedding
        >>> table, ids = torch.randn(100, 16), torch.tensor([[1, 5, 7], [5, 2, 0]])
        >>> lora_a, lora_b = torch.zeros(4, 100, requires_grad=True), torch.randn(16, 4)
        >>> torch.equal(lora_embedding(ids, table, lora_a, lora_b, scale=2.0), table[ids])
        True
    """
    _check(input_ids, weight, lora_a, lora_b)
    factor = checks.check_run_time_scale("scale", scale, weight)
    padding = -1 if padding_idx is None else _check_padding(padding_idx, weight.shape[0])
    # A tensor while tracing: a float would compile one graph per value.
    apply: Callable[..., Tensor] = _apply
    run_scale = factor
    if torch.compiler.is_compiling():
        apply = _traced_apply
        if not isinstance(factor, Tensor):
            run_scale = torch.full((), factor, dtype=wide_dtype(weight.dtype), device=weight.device)
    arguments = (input_ids, weight, lora_a, lora_b, run_scale, padding)
    if not checks.autocast_enabled(weight.device):
        return apply(*arguments)
    with torch.autocast(weight.device.type, enabled=False):
        return apply(*arguments)


def _check(input_ids: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    checks.check_integers("input_ids", input_ids, _INTEGERS)
    named: dict[str, Tensor | None] = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if not checks.uniform(weight, lora_a, lora_b):
        for name, value in named.items():
            checks.check_tensor(name, value)
        for name in ("lora_a", "lora_b"):
            value = named[name]
            assert value is not None
            if torch.promote_types(value.dtype, weight.dtype) is not value.dtype:
                raise TypeError(
                    f"{name} is {value.dtype} and weight is {weight.dtype}: cast {name} to "
                    f"{weight.dtype}, or to float32 beside a 16-bit table"
                )
    checks.check_same_device(named, input_ids.device, of="input_ids")
    checks.check_ndim("weight", weight, 2, "[V, D]")
    checks.check_ndim("lora_a", lora_a, 2, "[r, V]")
    checks.check_ndim("lora_b", lora_b, 2, "[D, r]")
    (rows, width), rank = weight.shape, lora_a.shape[0]
    if rank == 0:
        raise ValueError("lora_a must have a rank of at least 1, got shape [0, V]")
    if lora_a.shape[1] != rows:
        raise ValueError(
            f"lora_a must have shape [r, {rows}] to fit weight {list(weight.shape)}, "
            f"got {list(lora_a.shape)}"
        )
    if lora_b.shape != (width, rank):
        raise ValueError(
            f"lora_b must have shape [{width}, {rank}] to fit weight {list(weight.shape)} and "
            f"lora_a {list(lora_a.shape)}, got {list(lora_b.shape)}"
        )


def _check_padding(value: object, rows: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"padding_idx must be an integer or None, got {checks.describe(value)}")
    if not -rows <= value < rows:
        raise ValueError(f"padding_idx must lie in [{-rows}, {rows}), got {value}")
    return value % rows
