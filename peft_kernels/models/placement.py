"""Put bottleneck adapters behind, or beside, the layers of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.adapter.layer import Adapter
from peft_kernels.models.replace import replace

# What the papers' adapters are made of; every option can be given otherwise.
STYLES: dict[str, dict[str, Any]] = {
    "pfeiffer": {"activation": "relu", "reduction_factor": 16},
    "houlsby": {"activation": "silu", "reduction_factor": 16},
    "parallel": {
        "activation": "relu",
        "reduction_factor": 2,
        "scale": 4.0,
        "init": "mam_adapter",
        "parallel": True,
    },
}
# nn.TransformerEncoderLayer asks its attention for it.
_READ_BY_TORCH = "_qkv_same_embed_dim"


class AdaptedModule(nn.Module):
    """A module with an adapter on its output: ``adapter(module(x))``.

    Where the adapter is parallel: ``adapter(x, residual=module(x))``, x being the module's first
    argument. Of a module that returns a tuple, as attention does, the first item is adapted.
    Parameters of the module are left as they are: freeze them first. Public attributes that this
    module does not have are the module's: models ask a layer for its dtype or its heads.

    Args:
        module: what is adapted.
        adapter: what adapts it.

    Example:
        >>> import torch
        >>> from peft_kernels import Adapter, AdaptedModule
        >>> layer = AdaptedModule(torch.nn.Linear(8, 16), Adapter(16, init="mam_adapter"))
        >>> x = torch.randn(2, 8)
        >>> torch.equal(layer(x), layer.module(x))
        True
    """

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        """Hold both."""
        super().__init__()
        self.module = module
        self.adapter = adapter
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        """Return a parameter or a module by its name, else an attribute of the module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # The module may not be there yet, while this one is made, copied or unpickled. What is
            # private belongs to one module: the hooks of accelerate put the forward of theirs back.
            if name == "module" or (name.startswith("_") and name != _READ_BY_TORCH):
                raise
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns for these arguments, adapted."""
        output = self.module(*args, **kwargs)
        first, *others = output if isinstance(output, tuple) else (output,)
        if self.adapter.parallel:
            adapted = self.adapter(self._input(args, kwargs), residual=first)
        else:
            adapted = self.adapter(first)
        return (adapted, *others) if isinstance(output, tuple) else adapted

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the first argument of the module's forward, however it was passed."""
        if args:
            return args[0]
        name = next(iter(inspect.signature(self.module.forward).parameters), "")
        if name not in kwargs:
            kind = type(self.module).__name__
            raise TypeError(f"pass the input of {kind} as its first argument: its adapter reads it")
        return kwargs[name]


def add_adapters(
    model: nn.Module,
    targets: str | Iterable[str],
    style: str = "pfeiffer",
    *,
    d_model: int | None = None,
    **options: Any,
) -> list[str]:
    """Wrap every module that a target names as ``AdaptedModule``, in place, by ``replace``.

    Args:
        model: the model to change.
        targets: names or suffixes, as ``replace`` takes them. Pfeiffer et al. adapt the output of
            each feed-forward layer, Houlsby et al. that and the output of each attention, He et
            al. put a parallel adapter beside the feed-forward layer.
        style: "pfeiffer" (relu, D / 16), "houlsby" (silu, D / 16) or "parallel" (relu, D / 2,
            scale 4, up-projection from zero, fed with the module's input).
        d_model: width of the adapted output; None takes ``out_features``, ``embedding_dim`` or
            ``normalized_shape`` of the module.
        **options: of ``Adapter``, in place of the style's.

    Returns:
        The full names of what was wrapped, in the order of the model.

    Raises:
        TypeError: a target is not a string.
        ValueError: an unknown style, a target that matched nothing, a module whose width is not
            known, a module whose parent reads its weight instead of calling it.

    Example:
        >>> from torch import nn
        >>> from peft_kernels import add_adapters
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> add_adapters(model.requires_grad_(False), "2", "houlsby", reduction_factor=4)
        ['2']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        552
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")

    def build(module: nn.Module) -> nn.Module:
        own = next(module.parameters(), None)
        place: dict[str, Any] = {} if own is None else {"device": own.device}
        if own is not None and own.is_floating_point():
            place["dtype"] = own.dtype
        width = _width(module) if d_model is None else d_model
        return AdaptedModule(module, Adapter(width, **(place | STYLES[style] | options)))

    return replace(model, targets, build)


def _width(module: nn.Module) -> int:
    for name in ("out_features", "embedding_dim", "normalized_shape"):
        width = getattr(module, name, None)
        if width is not None:
            return int(width[-1] if isinstance(width, (tuple, list, torch.Size)) else width)
    # Attention modules call their width differently.
    width = getattr(module, "embed_dim", None)
    if isinstance(width, int):
        return width
    raise ValueError(f"the width of a {type(module).__name__}'s output is not known: give d_model")
