"""The layers that peft made: which of them a kernel serves, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_kernels.models.fused import peft_embedding, peft_lora, peft_prompts
from peft_kernels.models.fused.found import PLAIN, Found

# By the class of peft's layer: what serves it.
_SERVED: dict[type, Any] = {
    each.__dict__[PLAIN]: each for each in (peft_lora.FusedLinear, peft_embedding.FusedEmbedding)
}


def find(model: nn.Module) -> Iterator[Found]:
    """Yield every layer of a tuner of peft, and every model with a prompt, under all its names."""
    yield from peft_prompts.find(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if not issubclass(type(module), BaseTunerLayer):
            continue
        if name and isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            yield Found(name, module, "", None, "nn.MultiheadAttention reads its weight alone")
        else:
            yield _found(name, module)


def _found(name: str, module: nn.Module) -> Found:
    kind = type(module)
    fused = _SERVED.get(kind.__dict__.get(PLAIN, kind))
    if fused is None:
        return Found(name, module, "", None, f"no kernel for {_described(kind)}")
    reason = fused.why_not(module)
    return Found(name, module, fused.op_of(module), None if reason else fused, reason or "")


def _described(kind: type) -> str:
    """Return a class as users know it: ``peft.tuners.ia3.layer.Linear``."""
    return f"{kind.__module__}.{kind.__qualname__}"
