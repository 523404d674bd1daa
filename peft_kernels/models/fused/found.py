"""What the finders of ``accelerate`` report, and how a layer changes its class and back.

An accelerated layer is the same object with another class, a subclass of its own: parameters,
hooks, state dict keys and ``isinstance`` stay as they are, copies and pickles work, and whatever
its forward cannot take goes to the class above.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

# The attribute of a fused class that names the class it stands for.
PLAIN = "peft_kernels_plain_class"


class Found(NamedTuple):
    """A layer of an adapter method.

    Attributes:
        name: full name in the model.
        module: the layer.
        op: the function of peft_kernels that serves it.
        fused: the class that it gets, or None where it stays as it is.
        reason: why it stays as it is.
        holder: the module that holds it, where its fused class wants to know.
    """

    name: str
    module: nn.Module
    op: str
    fused: type[nn.Module] | None
    reason: str = ""
    holder: nn.Module | None = None


def fuse(module: nn.Module, fused: type[nn.Module], holder: nn.Module | None = None) -> None:
    """Make ``module``, a part of ``holder``, an instance of ``fused``."""
    module.__class__ = fused
    acquired = getattr(module, "_peft_kernels_acquired", None)
    if acquired is not None:
        acquired() if holder is None else acquired(holder)


def is_fused(module: nn.Module) -> bool:
    """Return whether ``module`` is accelerated."""
    return PLAIN in type(module).__dict__


def restore(module: nn.Module) -> bool:
    """Give an accelerated module its own class again; return whether it was one."""
    if not is_fused(module):
        return False
    released = getattr(module, "_peft_kernels_released", None)
    if released is not None:
        released()
    module.__class__ = type(module).__dict__[PLAIN]
    return True


def hooked(module: nn.Module) -> bool:
    """Return whether calling ``module`` does more than its class's forward."""
    own = module.__dict__.get("forward")
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        # Removing a hook of accelerate leaves the class's own forward there.
        or (own is not None and getattr(own, "__func__", None) is not type(module).forward)
    )
