"""Fused kernels for parameter-efficient fine-tuning.

The names below are imported when they are first used: importing the package touches no GPU and
imports neither Triton nor the compiled extension.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from peft_kernels.version import __version__

if TYPE_CHECKING:
    from peft_kernels.adapter.grouped import adapter_grouped
    from peft_kernels.adapter.layer import Adapter
    from peft_kernels.adapter.op import adapter
    from peft_kernels.core.backend import BackendUnavailable, Explanation, explain
    from peft_kernels.lora.dora import dora_linear
    from peft_kernels.lora.embedding import lora_embedding
    from peft_kernels.lora.layer import LoRALinear
    from peft_kernels.lora.op import lora_linear
    from peft_kernels.lora.projections import lora_projections
    from peft_kernels.models.accelerate import AccelerationReport, accelerate, unaccelerate
    from peft_kernels.models.attention.bridge import attach_prefixes, detach_prefixes
    from peft_kernels.models.checkpoints.checkpoint import load_adapter, save_adapter
    from peft_kernels.models.parallel.tensor_parallel import (
        LoRAColwiseParallel,
        LoRARowwiseParallel,
    )
    from peft_kernels.models.placement import AdaptedModule, add_adapters
    from peft_kernels.models.replace import replace
    from peft_kernels.prefix.layer import PrefixAttention
    from peft_kernels.prefix.op import prefix_attention
    from peft_kernels.prompt.layer import PromptEmbedding
    from peft_kernels.prompt.op import PromptOutput, prompt_embedding

_HOMES = {
    "AccelerationReport": "peft_kernels.models.accelerate",
    "AdaptedModule": "peft_kernels.models.placement",
    "Adapter": "peft_kernels.adapter.layer",
    "BackendUnavailable": "peft_kernels.core.backend",
    "Explanation": "peft_kernels.core.backend",
    "LoRAColwiseParallel": "peft_kernels.models.parallel.tensor_parallel",
    "LoRALinear": "peft_kernels.lora.layer",
    "LoRARowwiseParallel": "peft_kernels.models.parallel.tensor_parallel",
    "PrefixAttention": "peft_kernels.prefix.layer",
    "PromptEmbedding": "peft_kernels.prompt.layer",
    "PromptOutput": "peft_kernels.prompt.op",
    "accelerate": "peft_kernels.models.accelerate",
    "adapter": "peft_kernels.adapter.op",
    "adapter_grouped": "peft_kernels.adapter.grouped",
    "add_adapters": "peft_kernels.models.placement",
    "attach_prefixes": "peft_kernels.models.attention.bridge",
    "detach_prefixes": "peft_kernels.models.attention.bridge",
    "dora_linear": "peft_kernels.lora.dora",
    "explain": "peft_kernels.core.backend",
    "lora_embedding": "peft_kernels.lora.embedding",
    "load_adapter": "peft_kernels.models.checkpoints.checkpoint",
    "lora_linear": "peft_kernels.lora.op",
    "lora_projections": "peft_kernels.lora.projections",
    "prefix_attention": "peft_kernels.prefix.op",
    "prompt_embedding": "peft_kernels.prompt.op",
    "replace": "peft_kernels.models.replace",
    "save_adapter": "peft_kernels.models.checkpoints.checkpoint",
    "unaccelerate": "peft_kernels.models.accelerate",
}

__all__ = [
    "AccelerationReport",
    "AdaptedModule",
    "Adapter",
    "BackendUnavailable",
    "Explanation",
    "LoRAColwiseParallel",
    "LoRALinear",
    "LoRARowwiseParallel",
    "PrefixAttention",
    "PromptEmbedding",
    "PromptOutput",
    "__version__",
    "accelerate",
    "adapter",
    "adapter_grouped",
    "add_adapters",
    "attach_prefixes",
    "detach_prefixes",
    "dora_linear",
    "explain",
    "load_adapter",
    "lora_embedding",
    "lora_linear",
    "lora_projections",
    "prefix_attention",
    "prompt_embedding",
    "replace",
    "save_adapter",
    "unaccelerate",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """A module whose public names stay what they are when a submodule of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # ``adapter`` is a function and the folder that it lives in.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
