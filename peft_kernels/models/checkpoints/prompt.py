"""Prompts and prefixes in peft's format: one tensor, ``prompt_embeddings``.

peft keeps a prompt as its rows [P, D], and prefixes as [P, layers · 2 · Hkv · d]: of each layer the
keys, then the values. An MLP in front of either is folded into it, in peft's files as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.models.attention.bridge import SUBMODULE, attach_prefixes
from peft_kernels.models.attention.layers import Shift, prefix_of, self_attention
from peft_kernels.models.checkpoints import files
from peft_kernels.models.checkpoints.base_names import Based, based_modules
from peft_kernels.prefix.virtual_tokens import VirtualTokens
from peft_kernels.prompt.layer import PromptEmbedding

_KEY = "prompt_embeddings"


def prompts(model: nn.Module) -> list[Based]:
    """Return the prompt embeddings of a model."""
    return [each for each in based_modules(model) if isinstance(each.module, PromptEmbedding)]


def prefixes(model: nn.Module) -> list[Based]:
    """Return the prefixes of a model's attention layers, in the order of these."""
    modules = based_modules(model)
    return [each for each in modules if each.name.rpartition(".")[2] == SUBMODULE]


def save_prompt(
    model: nn.Module, folder: Path, base_model: str | None, task_type: str | None
) -> list[str]:
    """Write the one prompt of ``model`` as peft does; return its name."""
    name, layer = _one_prompt(model)
    if layer.position != "start":
        raise ValueError(f"position={layer.position!r}: peft puts a prompt at the start alone")
    values = layer.virtual_tokens()
    settings = _settings("PROMPT_TUNING", base_model, task_type, *values.shape)
    settings["prompt_tuning_init"] = "RANDOM"
    files.write(folder, files.PEFT_TENSORS, settings, {_KEY: values})
    return [name]


def load_prompt(model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Read a prompt that peft or ``save_prompt`` wrote into the layer that ``model`` has."""
    name, layer = _one_prompt(model)
    if layer.projection is not None:
        raise ValueError(f"{name!r} has an MLP, the file its result: fold the layer first")
    _check_submodules(settings)
    tensors = files.read_tensors(folder / files.PEFT_TENSORS, {_KEY: tuple(layer.prompt.shape)})
    files.fill(layer.prompt, tensors[_KEY])
    layer.position = "start"
    return [name]


def _one_prompt(model: nn.Module) -> tuple[str, PromptEmbedding]:
    found = prompts(model)
    if len(found) != 1:
        names = ", ".join(repr(each.name) for each in found)
        raise ValueError(
            f"a file holds one prompt, the model has {len(found)} PromptEmbedding: {names}; make "
            f"one from its embedding, or give the layer itself in place of the model"
        )
    (name, _, layer) = found[0]
    assert isinstance(layer, PromptEmbedding)
    return name, layer


def save_prefixes(
    model: nn.Module, folder: Path, base_model: str | None, task_type: str | None
) -> list[str]:
    """Write the prefixes of ``model`` as peft does; return the names of their layers."""
    found = prefixes(model)
    tokens: list[Any] = [each.module for each in found]
    names = [each.name.removesuffix("." + SUBMODULE) for each in found]
    _check_attached(model, names, tokens)
    if len({each.num_virtual_tokens for each in tokens}) > 1:
        raise ValueError("the prefixes are of different lengths: peft's have one")
    # [Hkv, P, d] each, to [P, layers, 2, Hkv, d]
    pairs = [torch.stack(each.virtual_tokens()) for each in tokens]
    values = torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1)
    heads, size = tokens[0].num_kv_heads, tokens[0].head_dim
    settings = _settings("PREFIX_TUNING", base_model, task_type, len(values), heads * size)
    settings |= {
        "num_attention_heads": heads,
        "num_layers": len(tokens),
        "prefix_projection": False,
    }
    files.write(folder, files.PEFT_TENSORS, settings, {_KEY: values})
    return names


def load_prefixes(model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Read prefixes that peft or ``save_prefixes`` wrote; attach them where there are none."""
    count = files.option(settings, "num_virtual_tokens", (int,), 0)
    _check_submodules(settings)
    found = prefixes(model)
    tokens: list[Any] = [each.module for each in found]
    attached = self_attention(model, None)
    if found:
        names = [each.name.removesuffix("." + SUBMODULE) for each in found]
        _check_attached(model, names, tokens)
        if any(each.projection is not None for each in tokens):
            raise ValueError("the prefixes have an MLP, the file its result: fold them first")
    else:
        tokens = [prefix_of(each, count, False, False, None, None) for each in attached.values()]
    width = sum(2 * each.num_kv_heads * each.head_dim for each in tokens)
    expected = {_KEY: (tokens[0].num_virtual_tokens, width)}
    values = files.read_tensors(folder / files.PEFT_TENSORS, expected)[_KEY]
    if not found:
        dtype = torch.promote_types(values.dtype, tokens[0].prefix_key.dtype)
        attach_prefixes(model, num_virtual_tokens=count, shift_positions=True, dtype=dtype)
        tokens = [each.module for each in prefixes(model)]
    _fill(tokens, values)
    return list(attached)


def _fill(tokens: list[VirtualTokens], values: Tensor) -> None:
    parts = values.split([2 * each.num_kv_heads * each.head_dim for each in tokens], dim=1)
    for each, part in zip(tokens, parts, strict=True):
        assert each.prefix_key is not None and each.prefix_value is not None
        key, value = part.unflatten(1, (2, each.num_kv_heads, each.head_dim)).permute(1, 2, 0, 3)
        files.fill(each.prefix_key, key)
        files.fill(each.prefix_value, value)


def _check_attached(model: nn.Module, names: list[str], tokens: list[VirtualTokens]) -> None:
    """Raise unless these prefixes are what peft computes."""
    if any(each.gate is not None for each in tokens):
        raise ValueError("the prefixes have gates, which peft's have not")
    without = [name for name in self_attention(model, None) if name not in names]
    if without:
        raise ValueError(f"peft has a prefix in every layer, the model none in {without}")
    hooks = [hook for each in model.modules() for hook in each._forward_pre_hooks.values()]
    if not any(isinstance(hook, Shift) for hook in hooks):
        raise ValueError(
            "the prefixes were attached without shift_positions=True, and peft counts positions "
            "from the prefix: the same prefixes would give other results there"
        )


def _settings(
    kind: str, base_model: str | None, task_type: str | None, tokens: int, width: int
) -> dict[str, Any]:
    if task_type is None:
        raise ValueError(
            f'task_type must be given, for instance "CAUSAL_LM": peft chooses by it how a model '
            f"with {kind} is called"
        )
    return {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": kind,
        "revision": None,
        "task_type": task_type,
        "token_dim": width,
    }


def _check_submodules(settings: Mapping[str, Any]) -> None:
    count = files.option(settings, "num_transformer_submodules", (int,), 1)
    if count != 1:
        raise ValueError(
            f"{files.SETTINGS}: num_transformer_submodules={count}: encoder and decoder have a "
            f"part each there, which has no layer here"
        )
