"""``save_adapter`` and ``load_adapter``: what was trained, in the formats that others load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from peft_kernels.models.checkpoints import bottleneck as checkpoint_bottleneck
from peft_kernels.models.checkpoints import files
from peft_kernels.models.checkpoints import lora as checkpoint_lora
from peft_kernels.models.checkpoints import prompt as checkpoint_prompt
from peft_kernels.models.checkpoints.base_names import unwrapped

_OF_PEFT: dict[str, Callable[..., list[str]]] = {
    "LORA": checkpoint_lora.load,
    "PREFIX_TUNING": checkpoint_prompt.load_prefixes,
    "PROMPT_TUNING": checkpoint_prompt.load_prompt,
    # Its MLP is not in the file, what it gives is.
    "P_TUNING": checkpoint_prompt.load_prompt,
}


# What peft itself saves with an adapter of these tasks, and misses where it is not there.
_WITH_HEADS = {
    "SEQ_CLS": "classifier or score",
    "TOKEN_CLS": "classifier or score",
    "QUESTION_ANS": "qa_outputs",
}


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> list[str]:
    """Write the adapter of a model whose layers are this package's, for others to load.

    - ``LoRALinear`` layers become what ``PeftModel.from_pretrained(base, folder)`` of peft reads:
      factors, ranks and scalings in ``adapter_config.json`` and ``adapter_model.safetensors``.
    - The adapters of ``add_adapters`` become what ``load_adapter(folder, use_safetensors=True)``
      of adapters reads, ``adapter_config.json`` and ``adapter.safetensors``, where that has the
      same: behind the ``output.dense`` and ``attention.output.dense`` of BERT and its kin, or the
      ``mlp.down_proj`` and ``self_attn.o_proj`` of a Llama; sequential, with one set of options
      for all layers.

    - A ``PromptEmbedding`` at the start, and prefixes that ``attach_prefixes`` gave to every layer
      with ``shift_positions=True`` and without gates, become peft's PROMPT_TUNING and
      PREFIX_TUNING, MLPs folded into what they give.

    Nothing of the base model is written, but embeddings that ``load_adapter`` took from an adapter
    (below). A kill at any moment leaves the old adapter in ``folder`` whole, or the new one; other
    files in it stay.

    Where torch.distributed runs, call it in every process: shards are gathered, and the first
    process writes.

    Args:
        model: the model, or one of torch's wrappers around it (DDP, ``torch.compile``).
        folder: made where it does not exist.
        base_model: path or name of the model below, for who loads the adapter without it; None
            takes transformers' ``model.config._name_or_path``.
        task_type: peft's, for instance "CAUSAL_LM"; prompts and prefixes need it. Those of
            classifiers, with which peft saves the classifier, are refused: with
            "FEATURE_EXTRACTION" it loads the adapter into any model.

    Returns:
        The names of the layers, in the model as it was before they were placed.

    Raises:
        TypeError: not a module.
        ValueError: no layers of this package, layers of both kinds, or what the format cannot say.
        OSError: the folder cannot be written, or not in one step.

    Example:
        >>> import copy, tempfile, torch
        >>> from peft_kernels import LoRALinear, load_adapter, replace, save_adapter
        >>> base = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8))
        >>> other = copy.deepcopy(base)
        >>> replace(base, "1", lambda old: LoRALinear.from_linear(old, r=4, lora_alpha=8))
        ['1']
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_adapter(base, folder)
        ...     load_adapter(other, folder)
        ['1']
    """
    _check_module(model)
    inner = unwrapped(model)
    if base_model is None:
        base_model = getattr(getattr(inner, "config", None), "_name_or_path", None) or None
    kinds: dict[str, Callable[..., list[str]]] = {}
    for held, name, save in (
        (checkpoint_lora.layers(inner), "LoRALinear layers", checkpoint_lora.save),
        (checkpoint_bottleneck.layers(inner), "adapters", checkpoint_bottleneck.save),
        (checkpoint_prompt.prompts(inner), "a prompt", checkpoint_prompt.save_prompt),
        (checkpoint_prompt.prefixes(inner), "prefixes", checkpoint_prompt.save_prefixes),
    ):
        if held:
            kinds[f"{name} ({held[0].name or 'itself'})"] = save
    if not kinds:
        raise ValueError(
            "model has no layers of peft_kernels: place some, for instance by peft_kernels.replace "
            "with LoRALinear.from_linear; what peft made is saved by its own save_pretrained"
        )
    if len(kinds) > 1:
        raise ValueError(f"model has {' and '.join(kinds)}: no format has more than one kind")
    if task_type in _WITH_HEADS:
        raise ValueError(
            f"peft looks for {_WITH_HEADS[task_type]} in an adapter of task_type={task_type!r}, "
            f"and only the layers of peft_kernels are saved: pass task_type='FEATURE_EXTRACTION', "
            f"and save what else was trained beside it"
        )
    (save,) = kinds.values()
    return save(inner, Path(folder), base_model, task_type)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Read an adapter that ``save_adapter``, peft or adapters wrote into a model, in place.

    Of a LoRA adapter, the layers that it names are replaced by ``LoRALinear``; of a bottleneck
    adapter, they are wrapped as ``AdaptedModule``. Where they are that already, they are filled.
    Prefixes are attached, or filled where there are some; a prompt fills the ``PromptEmbedding``
    that the model has, or is.
    Options that are numbers (scaling, dropout) come from the folder. Everything is checked before
    anything is changed. New parameters have the wider of the file's dtype and the layer's.

    Where peft saved the model's embeddings or its head beside the factors, since one of them is a
    target or the vocabulary has grown, their weights and biases replace those of the model, as peft
    replaces them; ``save_adapter`` writes them again.

    Where torch.distributed runs, call it in every process, each with the folder at hand: of sharded
    parameters each takes its part. Layers are placed before ``fully_shard`` or
    ``parallelize_module``, not by loading into shards.

    Args:
        model: the model that the adapter was trained on, plain or with such layers.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``, or adapters'
            ``adapter.safetensors``.

    Returns:
        The names of the layers.

    Raises:
        TypeError: not a module.
        FileNotFoundError: a file is missing.
        ValueError: an unknown kind of adapter, settings that no layer here computes (DoRA, biases,
            ``modules_to_save``; gates), missing, surplus or misshapen tensors, tensors as a pickle.
    """
    _check_module(model)
    path = Path(folder)
    settings = files.read_settings(path)
    kind: Any = settings.get("peft_type")
    if kind is None and isinstance(settings.get("config"), dict):
        load = checkpoint_bottleneck.load
    elif isinstance(kind, str) and kind in _OF_PEFT:
        load = _OF_PEFT[kind]
    else:
        raise ValueError(
            f"{path / files.SETTINGS} has peft_type={kind!r}, which has no layer here: "
            f"{', '.join(_OF_PEFT)} have, and the bottlenecks of adapters"
        )
    return load(unwrapped(model), path, settings)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
