"""Models and calls of peft's prompt learning: what they are, and whether our kernels take them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, nn

from peft_kernels.models.fused.found import PLAIN

PLAIN_TENSORS = (Tensor, nn.Parameter)
# Set on a cache that was filled behind prefixes which are not in it.
WITHOUT_PREFIX = "_peft_kernels_without_prefix"
_OPS = {
    "PREFIX_TUNING": "prefix_attention",
    "PROMPT_TUNING": "prompt_embedding",
    "P_TUNING": "prompt_embedding",
    "MULTITASK_PROMPT_TUNING": "prompt_embedding",
}


def plain_class(model: Any) -> Any:
    """Return the class that peft gave a model."""
    return type(model).__dict__.get(PLAIN, type(model))


def types_of(model: Any) -> list[str]:
    """Return the name of the active adapter's method, none where all adapters were deleted."""
    active = model.active_adapter
    return [model.peft_config[active].peft_type.value] if isinstance(active, str) else []


def op_of(model: Any) -> str | None:
    """Return the function of peft_kernels for the active adapter, or None."""
    return next((_OPS.get(each) for each in types_of(model)), None)


def why_not_words(words: Any) -> str | None:
    """Return why rows of the word embeddings cannot be read without calling them."""
    if type(words) is not nn.Embedding:
        return f"its word embeddings are a {type(words).__module__}.{type(words).__qualname__}"
    trained = words.weight.requires_grad
    if words.max_norm is not None or (trained and (words.sparse or words.scale_grad_by_freq)):
        return "its word embeddings have max_norm, or sparse or scaled gradients"
    hooks = [*words._forward_hooks.values()]
    others = words._forward_pre_hooks or words._backward_hooks or words._backward_pre_hooks
    # Hooks for checkpointing make the result need gradients, as it does behind a trained prompt.
    if others or "forward" in words.__dict__ or not all(map(_requires_gradients, hooks)):
        return "its word embeddings have hooks or a forward of their own (offloading)"
    if type(words.weight) not in PLAIN_TENSORS:
        return f"its word embeddings are a {type(words.weight).__qualname__}"
    return None


def _requires_gradients(hook: Any) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def wants_attentions(model: Any, inputs: dict[str, Any]) -> bool:
    """Return whether a call asks for the attention weights."""
    wanted = inputs.get("output_attentions")
    return bool(model.base_model.config.output_attentions if wanted is None else wanted)


def takes_generation(model: Any, given: dict[str, Any]) -> bool:
    """Return whether ``generate`` may keep the prefix out of the cache."""
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    if given.get("inputs_embeds") is not None or (mask is not None and mask.dim() != 2):
        return False
    configs = given.get("generation_config"), model.base_model.generation_config
    if any(getattr(each, "output_attentions", False) for each in configs):
        return False
    if cache is not None and cache.get_seq_length() and not hasattr(cache, WITHOUT_PREFIX):
        return False
    return not wants_attentions(model, given)


def adjust_inputs(model: Any, inputs: dict[str, Any], keeps_token_types: bool) -> None:
    """Do to positions and token types what this version of peft does."""
    adjust = getattr(model, "_adjust_prompt_learning_kwargs", None)
    if adjust is not None:
        adjust(model.active_peft_config, kwargs=inputs, remove_token_type_ids=not keeps_token_types)
        return
    for name in ("position_ids",) if keeps_token_types else ("position_ids", "token_type_ids"):
        if inputs.get(name) is not None:
            warnings.warn(f"peft takes no {name} beside a prompt: ignored", stacklevel=4)
            inputs[name] = None


def uncover(model: Any) -> None:
    """Remove what ``disable_adapter`` leaves behind: methods of the class, kept by the model."""
    for name in ("forward", "prepare_inputs_for_generation"):
        if keeps_own(model, name):
            del model.__dict__[name]


def keeps_own(model: Any, name: str) -> bool:
    """Return whether the model keeps a method that its class, or its plain class, has anyway."""
    method = model.__dict__.get(name)
    if not inspect.ismethod(method) or method.__self__ is not model:
        return False
    owners = type(model), plain_class(model)
    return any(method.__func__ is getattr(each, name, None) for each in owners)
