"""The self-attention layers of a transformers model: which they are, their sizes and positions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peft_kernels.prefix.virtual_tokens import VirtualTokens

_CROSS = re.compile(r"cross|encoder_attn|EncDecAttention", re.IGNORECASE)
_POSITIONS = ("wpe", "position_embeddings")


def self_attention(model: nn.Module, targets: str | Iterable[str] | None) -> dict[str, nn.Module]:
    """Return the self-attention layers that targets name, by name."""
    found = {
        name: module
        for name, module in model.named_modules()
        if _uses_interface(module) and not _is_cross(name, module)
    }
    for name, module in found.items():
        # What the layer says of itself is all there is to go by where nothing is padded.
        if "decoder" in name and getattr(module, "is_causal", None) is False:
            raise ValueError(f"{name!r} is in a decoder and says is_causal=False: is it causal?")
        if _window_is_hidden(module):
            raise ValueError(f"{name!r} does not tell its attention of config.sliding_window")
        chosen_by = _own_choice_of_keys(module)
        if chosen_by is not None:
            raise ValueError(
                f"{name!r} chooses the keys of every query by its {chosen_by}: sparse attention "
                f"has no kernel"
            )
    if not found:
        raise ValueError(
            f"no self-attention that uses transformers' AttentionInterface in "
            f"{type(model).__name__}"
        )
    if targets is None:
        return found
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen = {
        name: module
        for name, module in found.items()
        if any(name == each or name.endswith("." + each) for each in wanted)
    }
    missing = [
        each
        for each in wanted
        if not any(name == each or name.endswith("." + each) for name in chosen)
    ]
    if missing or not chosen:
        raise ValueError(
            f"targets {missing} matched no self-attention; the model has {', '.join(found)}"
        )
    return chosen


def _window_is_hidden(module: nn.Module) -> bool:
    """Return whether a layer's window is in its masks alone, and not in what its forward passes."""
    config = getattr(module, "config", None)
    if not getattr(config, "sliding_window", None):
        return False
    if not getattr(config, "use_sliding_window", True):
        return False
    code = inspect.unwrap(type(module).forward).__code__
    names = {*code.co_names, *code.co_varnames}
    constants = [each for each in code.co_consts if isinstance(each, tuple)]
    return "sliding_window" not in names and not any("sliding_window" in each for each in constants)


def _own_choice_of_keys(module: nn.Module) -> str | None:
    """Return the name of what gives a layer a mask of its own (DeepSeek's indexer, Doge), or None.

    Both look into the model's mask first, as only "eager" and "sdpa" make it: with the mask of
    padding they fail there, before the attention function could say why.
    """
    if any(_last(name) == "indexer" for name, _ in module.named_modules()):
        return "indexer"
    dynamic = "prepare_dynamic_mask"
    return dynamic if hasattr(module, dynamic) else None


def _uses_interface(module: nn.Module) -> bool:
    """Return whether a module's forward calls what ``AttentionInterface`` gives it."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_cross(name: str, module: nn.Module) -> bool:
    own = name.rpartition(".")[2] + type(module).__name__
    return bool(getattr(module, "is_cross_attention", False)) or bool(
        _CROSS.search(own) or _CROSS.search(name.rpartition(".")[0].rpartition(".")[2])
    )


def prefix_of(
    layer: nn.Module,
    tokens: int,
    gated: bool,
    prefix_projection: bool,
    projection_hidden: int | None,
    dtype: torch.dtype | None,
) -> VirtualTokens:
    """Return a prefix that fits an attention layer."""
    heads, kv_heads, size = heads_of(layer)
    weight = next(each for each in layer.parameters() if each.is_floating_point())
    return VirtualTokens(
        heads * size, heads, kv_heads, size, num_virtual_tokens=tokens, gated=gated,
        prefix_projection=prefix_projection, projection_hidden=projection_hidden,
        device=weight.device, dtype=dtype or weight.dtype,
    )  # fmt: skip


def heads_of(layer: nn.Module) -> tuple[int, int, int]:
    """Return Hq, Hkv and d of an attention layer of any of transformers' namings.

    Raises:
        ValueError: sizes that go by other names, or keys and values of different head sizes.
    """
    config: Any = layer.config
    heads = _first(layer, config, "num_heads", "num_attention_heads", "n_heads")
    groups = getattr(layer, "num_key_value_groups", None)
    size = _first(layer, config, "qk_head_dim", "head_dim", "attention_head_size", "head_size")
    of_values = getattr(layer, "v_head_dim", size)
    if of_values != size:
        raise ValueError(
            f"{type(layer).__name__} has heads of {size} for keys and of {of_values} for values: "
            f"head sizes that differ have no kernel"
        )
    return heads, heads // groups if groups else heads, size


def _first(layer: nn.Module, config: Any, *names: str) -> int:
    for holder in (layer, config):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    raise ValueError(
        f"a {type(layer).__name__} has none of {', '.join(names)}: what its heads are is not known"
    )


def position_modules(model: nn.Module, layers: Iterable[str]) -> list[nn.Module]:
    """Return the modules that turn the positions of these attention layers into embeddings.

    Raises:
        ValueError: a layer has none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if _is_rotary(module) or (type(module) is nn.Embedding and _last(name) in _POSITIONS)
    }
    covering: dict[str, nn.Module] = {}
    for layer in layers:
        own = {name: module for name, module in found.items() if _covers(name, layer)}
        if not own:
            raise ValueError(
                f"shift_positions=True finds no positions of {layer!r}: neither rotary embeddings "
                f"nor an nn.Embedding named {' or '.join(_POSITIONS)} beside it"
            )
        covering |= own
    return list(covering.values())


def _is_rotary(module: nn.Module) -> bool:
    positions = "position_ids" in inspect.signature(module.forward).parameters
    return positions and type(module).__name__.endswith("RotaryEmbedding")


def _covers(name: str, layer: str) -> bool:
    """Return whether embeddings stand in, or in a part "embeddings" of, what holds the layer."""
    holder = name.rpartition(".")[0]
    if _last(holder) == "embeddings":
        holder = holder.rpartition(".")[0]
    return not holder or layer == holder or layer.startswith(holder + ".")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


class Shift:
    """A hook that adds P to the positions that a module is given (a class, so that it pickles)."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the module is given in place of these."""
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] + self.tokens}
        # Positions are the second of (x, position_ids, ...), alone where nn.Embedding is called.
        at = 0 if isinstance(module, nn.Embedding) else 1
        return (*args[:at], args[at] + self.tokens, *args[at + 1 :]), kwargs
