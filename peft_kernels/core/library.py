"""Registration with ``torch.library``: what makes a launcher visible to ``torch.compile``.

A launcher writes into tensors that Python allocated and returns nothing. Registered as an
out-variant it needs no fake implementation and no autograd formula of its own: the
``autograd.Function`` around it is traced, the launcher stays opaque. In eager mode the launcher is
called directly, because a dispatcher hop costs more host time than the whole Python side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def out_variant_op(
    name: str, launcher: Callable[..., None], schema: str, writes: tuple[str, ...]
) -> Callable[..., None]:
    """Register ``launcher`` as ``peft_kernels::name`` and return a function that picks the way in.

    Args:
        name: op name inside the ``peft_kernels`` namespace.
        launcher: a function that fills some of its arguments and returns None.
        schema: its schema, ``(Tensor x, Tensor(a!) y) -> ()``.
        writes: names of the arguments that it fills.

    Returns:
        A function with the launcher's parameters, positional: the op while ``torch.compile``
        traces, the launcher itself in eager mode.
    """
    op = torch.library.custom_op(
        f"peft_kernels::{name}", launcher, mutates_args=writes, schema=schema
    )

    is_compiling = torch.compiler.is_compiling  # looked up once, not in every call

    def run(*args: object) -> None:
        if is_compiling():
            op(*args)
        else:
            launcher(*args)

    return run


def eager_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` for eager mode, without torch's preparations for torch.func.

    They take a tenth of a small layer's host time on every call. A torch.func transform is refused.
    """
    bare = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    transforming = torch._C._are_functorch_transforms_active

    def apply(*args: object) -> Any:
        if transforming():
            raise RuntimeError(
                f"{function.__name__} does not support torch.func (grad, vmap, jvp and others): "
                "differentiate with torch.autograd, and batch by leading dimensions"
            )
        return bare(*args)

    return apply


def traced_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` for a traced call, which refuses one tensor in two places.

    The second is given as a view of the first, such as a key that is the value too.
    """

    def apply(*args: Any) -> Any:
        single: list[Any] = []
        for each in args:
            again = isinstance(each, torch.Tensor) and any(each is other for other in single)
            single.append(each.view_as(each) if again else each)
        return function.apply(*single)

    return apply


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Do what torch's ``once_differentiable`` does, at no cost while gradients are not recorded.

    That is so in every backward without ``create_graph``, and there it does nothing.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            return guarded(ctx, *gradients)
        return backward(ctx, *gradients)

    return run
