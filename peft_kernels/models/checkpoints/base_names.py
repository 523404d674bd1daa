"""The names that modules have in the model as it was before anything was wrapped around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from peft_kernels.models.placement import AdaptedModule

# What torch.compile, checkpoint wrappers and FSDP put between a module and its parent.
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Based(NamedTuple):
    """A module of a model that may have been wrapped since.

    Attributes:
        name: full name in the plain model.
        path: full name now, in the unwrapped model.
        module: the module.
    """

    name: str
    path: str
    module: nn.Module


def based_modules(model: nn.Module) -> Iterator[Based]:
    """Yield the modules of a model, outer ones first, a shared one under each of its names.

    An ``AdaptedModule`` and the module in it have the same name.
    """
    yield from _walk("", "", unwrapped(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside data parallelism and ``torch.compile``."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _walk(name: str, path: str, module: nn.Module) -> Iterator[Based]:
    yield Based(name, path, module)
    for part, child in module._modules.items():
        if child is None:
            continue
        inner = _joined(path, part)
        if isinstance(module, AdaptedModule):
            if part == "module":
                yield from _walk(name, inner, child)
        elif part in _TRANSPARENT:
            yield from _walk(name, inner, child)
        else:
            yield from _walk(_joined(name, part), inner, child)


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
