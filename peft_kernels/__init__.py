"""Fused kernels for parameter-efficient fine-tuning.

The names below are imported when they are first used: importing the package touches no GPU and
imports neither Triton nor the compiled extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_kernels.version import __version__

if TYPE_CHECKING:
    from peft_kernels.core.backend import BackendUnavailable, Explanation, explain
    from peft_kernels.lora.layer import LoRALinear
    from peft_kernels.lora.op import lora_linear
    from peft_kernels.models.replace import replace
    from peft_kernels.prompt.layer import PromptEmbedding
    from peft_kernels.prompt.op import PromptOutput, prompt_embedding

_HOMES = {
    "BackendUnavailable": "peft_kernels.core.backend",
    "Explanation": "peft_kernels.core.backend",
    "LoRALinear": "peft_kernels.lora.layer",
    "PromptEmbedding": "peft_kernels.prompt.layer",
    "PromptOutput": "peft_kernels.prompt.op",
    "explain": "peft_kernels.core.backend",
    "lora_linear": "peft_kernels.lora.op",
    "prompt_embedding": "peft_kernels.prompt.op",
    "replace": "peft_kernels.models.replace",
}

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "LoRALinear",
    "PromptEmbedding",
    "PromptOutput",
    "__version__",
    "explain",
    "lora_linear",
    "prompt_embedding",
    "replace",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
