"""Registration with ``torch.library``: what makes a launcher visible to ``torch.compile``.

A launcher writes into tensors that Python allocated and returns nothing. Registered as an
out-variant it needs no fake implementation and no autograd formula of its own: the
``autograd.Function`` around it is traced, the launcher stays opaque. In eager mode the launcher is
called directly, because a dispatcher hop costs more host time than the whole Python side; not so
where tensors have no data (fake tensors) or what runs is recorded (``make_fx``) or counted
(``FlopCounterMode``): a launcher would write to nowhere, or leave nothing to record or count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _python_dispatch

from peft_kernels.core.operands import wide_dtype

# Classes of tensors that a launcher can always take.
_WITH_DATA = {torch.Tensor, torch.nn.Parameter}


def out_variant_op(
    name: str,
    launcher: Callable[..., None],
    schema: str,
    writes: tuple[str, ...],
    flops: Callable[[Mapping[str, Any]], int] | None = None,
) -> Callable[..., None]:
    """Register ``launcher`` as ``peft_kernels::name`` and return a function that picks the way in.

    Args:
        name: op name inside the ``peft_kernels`` namespace.
        launcher: a function that fills some of its arguments and returns None.
        schema: its schema, ``(Tensor x, Tensor(a!) y) -> ()``.
        writes: names of the arguments that it fills.
        flops: from its arguments by name to its floating-point operations; None where it launches
            none of its own, or PyTorch's operations, which are counted one by one.

    Returns:
        A function with the launcher's parameters, positional: the op while ``torch.compile``
        or ``make_fx`` traces, for fake tensors and where FLOPs are counted, the launcher itself
        otherwise.
    """
    op = torch.library.custom_op(
        f"peft_kernels::{name}", launcher, mutates_args=writes, schema=schema
    )

    packet = getattr(torch.ops.peft_kernels, name)
    registered = packet.default
    kinds = [str(each.type) for each in registered._schema.arguments]
    names = [each.name for each in registered._schema.arguments]

    def formula(*args: object, out_val: object = None, **named: object) -> int:
        assert flops is not None
        return flops(dict(zip(names, args, strict=False)) | named)

    # Looked up once, not in every call.
    is_compiling, modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack

    def run(*args: object) -> None:
        if is_compiling():
            # A traced backward may follow a forward that was not, which saved numbers.
            op(*_with_tensors(args, kinds))
        elif type(args[0]) in _WITH_DATA and not modes():
            launcher(*args)
        else:
            told = flops and modes() and _counts(packet, formula)
            if told or _traces() or _is_fake(_first(args)):
                op(*_with_tensors(args, kinds))
            else:
                launcher(*args)

    return run


def _is_fake(tensor: object) -> bool:
    # By its name: to import the class is to import Triton.
    return type(tensor).__name__ == "FakeTensor"


def _traces() -> bool:
    """Return whether a mode of torch's own stands between a call and its tensors' data."""
    keys = torch._C._TorchDispatchModeKey
    return any(
        torch._C._get_dispatch_mode(key) is not None
        for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    )


def _counts(packet: Any, formula: Callable[..., int]) -> bool:
    """Return whether FLOPs are counted; every counter that does not know the op is told of it.

    It is told here, since its module, which would register the formula for all, imports Triton.
    """
    modes: list[Any] = _python_dispatch._get_current_dispatch_mode_stack()
    names = ("FlopCounterMode", "_FlopCounterMode")
    counters = [getattr(each, "counter", each) for each in modes if type(each).__name__ in names]
    for counter in counters:
        counter.flop_registry.setdefault(packet, formula)
    return bool(counters)


def _first(args: tuple[object, ...]) -> Any:
    """Return the first tensor; ops begin with one, or with a list of them."""
    first = args[0]
    return first[0] if type(first) is list else first


def _with_tensors(args: tuple[object, ...], kinds: list[str]) -> list[object]:
    """Return ``args`` with a 0-d tensor for each number that the schema takes as a tensor."""
    first = _first(args)

    def made(value: object, kind: str) -> object:
        if isinstance(value, (list, tuple)):
            return [made(each, kind) for each in value]
        if "Tensor" not in kind or not isinstance(value, (int, float)):
            return value
        return first.new_full((), value, dtype=wide_dtype(first.dtype))

    return [made(value, kind) for value, kind in zip(args, kinds, strict=True)]


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
    """Refuse to differentiate a backward again.

    torch's decorator of this name refuses only where the gradients that arrive are to be
    differentiated, and gives zeros without a word where they are constants, although the results
    depend on what forward saved too. In a backward without ``create_graph`` nothing has to be done.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        return guarded(ctx, *[g if g is None else g.detach().requires_grad_() for g in gradients])

    return run
