"""LoRA in peft's format: ``LoRALinear`` layers to a folder and back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.lora.layer import LoRALinear
from peft_kernels.models.checkpoints import embeddings, files
from peft_kernels.models.checkpoints.base_names import Based, based_modules, unwrapped
from peft_kernels.models.checkpoints.embeddings import PREFIX
from peft_kernels.models.replace import replace_named

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)

# Entries of peft's settings that are used, or say nothing of what the loaded layers compute.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Ways to start training that leave the base weights alone; the others change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def layers(model: nn.Module) -> list[Based]:
    """Return the LoRA layers of a model."""
    return [each for each in based_modules(model) if isinstance(each.module, LoRALinear)]


def save(
    model: nn.Module, folder: Path, base_model: str | None, task_type: str | None
) -> list[str]:
    """Write the LoRA layers of ``model`` as peft does; return their names."""
    found: dict[str, Any] = {each.name: each.module for each in layers(model)}
    _check_shared(found)
    settings: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": None,
        "target_modules": _targets(found, [each.name for each in based_modules(model)]),
        "task_type": task_type,
        "use_dora": False,
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in found.items():
        key_a, key_b = _keys(name)
        tensors |= {key_a: layer.lora_A, key_b: layer.lora_B}
    tensors |= embeddings.saved_with(_by_name(model))
    files.write(folder, files.PEFT_TENSORS, settings | _options(found), tensors)
    return list(found)


def _check_shared(found: Mapping[str, nn.Module]) -> None:
    first: dict[int, str] = {}
    for name, layer in found.items():
        if first.setdefault(id(layer), name) != name:
            raise ValueError(
                f"{first[id(layer)]!r} and {name!r} are one LoRALinear: peft loads an adapter into "
                f"the first of the two alone, so that what it gives would differ"
            )


def _targets(names: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Return what peft resolves to these layers and to no other module.

    In a list each name also stands for those that end in it, at a dot.
    """
    ends = tuple("." + name for name in names)
    if any(name.endswith(ends) and name not in names for name in modules):
        return f"(?:{'|'.join(map(re.escape, names))})"
    return list(names)


def _options(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return ranks and scalings: the most common, and those of the layers that differ."""
    dropouts = {layer.lora_dropout: name for name, layer in found.items()}
    if len(dropouts) > 1:
        different = ", ".join(f"{p} in {name!r}" for p, name in dropouts.items())
        raise ValueError(
            f"peft's settings have one lora_dropout for all layers, these have {different}: set "
            f"layer.lora_dropout to one value"
        )
    use_rslora = all(layer.use_rslora for layer in found.values())
    ranks = {name: layer.r for name, layer in found.items()}
    alphas = {name: _alpha(layer, use_rslora) for name, layer in found.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(dropouts)),
        "use_rslora": use_rslora,
        # Keys are expressions, and match the end of a name unless they say where it begins.
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
    }


def _alpha(layer: LoRALinear, use_rslora: bool) -> float:
    divisor = math.sqrt(layer.r) if use_rslora else layer.r
    stated = layer.lora_alpha
    return stated if stated / divisor == layer.scaling else layer.scaling * divisor


def load(model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Read what ``save`` or peft wrote into ``model``; return the names of the layers."""
    _refuse(settings)
    model = unwrapped(model)
    modules = _by_name(model)
    names = _resolved(settings, model, modules)
    _check_modules(names, modules)
    options = {name: _options_of(settings, name) for name in names}
    expected: dict[str, tuple[int, ...]] = {}
    for name in names:
        base: Any = modules[name].module
        rank = options[name]["r"]
        if isinstance(base, LoRALinear) and base.r != rank:
            raise ValueError(f"{name!r} has rank {base.r}, the adapter in {folder} {rank}")
        key_a, key_b = _keys(name)
        expected |= {key_a: (rank, base.in_features), key_b: (base.out_features, rank)}
    words = embeddings.loadable(model, modules)
    shapes = {key: tuple(value.shape) for key, value in words.items()}
    tensors = files.read_tensors(folder / files.PEFT_TENSORS, expected, shapes)
    embeddings.check(words, tensors)

    new = {modules[name].path: name for name in names if type(modules[name].module) in _LINEAR}
    built = {id(modules[name].module): name for name in new.values()}

    def build(old: Any) -> nn.Module:
        name = built[id(old)]
        dtype = torch.promote_types(tensors[_keys(name)[0]].dtype, old.weight.dtype)
        return LoRALinear.from_linear(old, **options[name], dtype=dtype)

    replace_named(model, new, build)
    for name in names:
        layer: Any = model.get_submodule(modules[name].path)
        _fill(layer, options[name], *(tensors[key] for key in _keys(name)))
    embeddings.fill(_by_name(model), words, tensors)
    return names


def _keys(name: str) -> tuple[str, str]:
    """Return peft's names of a layer's A and B."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _by_name(model: nn.Module) -> dict[str, Based]:
    """Return the modules by name, a shared one under its first name, as peft sees them."""
    seen: set[int] = set()
    modules: dict[str, Based] = {}
    for each in based_modules(model):
        if id(each.module) not in seen:
            seen.add(id(each.module))
            modules[each.name] = each
    return modules


def _fill(layer: LoRALinear, options: Mapping[str, Any], a: Tensor, b: Tensor) -> None:
    files.fill(layer.lora_A, a)
    files.fill(layer.lora_B, b)
    layer.lora_alpha, layer.use_rslora = options["lora_alpha"], options["use_rslora"]
    layer.lora_dropout = options["lora_dropout"]
    layer.scaling = layer.lora_alpha / (math.sqrt(layer.r) if layer.use_rslora else layer.r)


def _refuse(settings: Mapping[str, Any]) -> None:
    """Raise where the settings ask for what a LoRALinear does not compute."""
    odd = {k: v for k, v in settings.items() if k not in _KNOWN and v not in (None, False, [], {})}
    if settings.get("bias", "none") != "none":
        odd["bias"] = settings["bias"]
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        odd["init_lora_weights"] = start
    if odd:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(odd.items()))
        raise ValueError(
            f"{files.SETTINGS}: a LoRALinear has no {listed}; load the adapter with peft and call "
            f"peft_kernels.accelerate on the model, or merge it there"
        )


def _options_of(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    rank = _of_pattern(settings, "rank_pattern", "r", 8, (int,), name)
    alpha = _of_pattern(settings, "alpha_pattern", "lora_alpha", 8, (int, float), name)
    dropout = files.option(settings, "lora_dropout", (int, float), 0.0)
    if rank < 1 or not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise ValueError(
            f"{files.SETTINGS}: r={rank}, lora_alpha={alpha}, lora_dropout={dropout} for {name!r}: "
            f"the rank must be at least 1, alpha finite, the dropout in [0, 1)"
        )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(dropout),
        "use_rslora": files.option(settings, "use_rslora", (bool,), False),
    }


def _of_pattern(
    settings: Mapping[str, Any], patterns: str, key: str, default: Any, kinds: tuple[type, ...],
    name: str,
) -> Any:  # fmt: skip
    """Return an option of one layer: that of the first pattern that fits, or that of all."""
    for pattern, value in files.option(settings, patterns, (dict,), {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return files.option({pattern: value}, pattern, kinds, default)
    return files.option(settings, key, kinds, default)


def _resolved(
    settings: Mapping[str, Any], model: nn.Module, modules: Mapping[str, Based]
) -> list[str]:
    """Return the names of the modules that the settings target, as peft resolves them."""
    targets = files.option(settings, "target_modules", (str, list), [])
    excluded = files.option(settings, "exclude_modules", (str, list), [])
    if isinstance(targets, str) and targets.lower() == "all-linear":
        names = _all_linear(model, modules)
    else:
        names = [name for name in modules if name and _matches(name, targets)]
    names = [name for name in names if not _matches(name, excluded)]
    if not isinstance(targets, str):
        # A target that is a whole name is one whatever layer it is of.
        names = [name for name in names if name in targets or _in_wanted_layer(name, settings)]
    if not names:
        raise ValueError(
            f"{files.SETTINGS}: target_modules={targets!r} names no module of this "
            f"{type(model).__name__}: is it the model that the adapter was trained on?"
        )
    return names


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return bool(targets) and re.fullmatch(targets, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in targets)


def _all_linear(model: nn.Module, modules: Mapping[str, Based]) -> list[str]:
    """Return the names of every linear layer but the output embeddings."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, (_, _, module) in modules.items()
        if isinstance(module, (*_LINEAR, LoRALinear)) and module is not head
    ]


def _in_wanted_layer(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether peft's ``layers_to_transform``, where it is given, holds a module's layer."""
    wanted = files.option(settings, "layers_to_transform", (int, list), [])
    if wanted == []:
        return True
    patterns = files.option(settings, "layers_pattern", (str, list), [])
    patterns = [patterns] if isinstance(patterns, str) else patterns
    starts = [rf"(?:^|.*?\.){each}" for each in patterns if each] or [r".*?\.[^.]*"]
    for start in starts:
        found = re.match(rf"{start}\.(\d+)\.", name)
        if found is not None:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _check_modules(names: list[str], modules: Mapping[str, Based]) -> None:
    """Raise unless each named module can hold the factors, and no other has some."""
    for name in names:
        module: Any = modules[name].module
        if type(module) not in (*_LINEAR, LoRALinear):
            kind = type(module)
            raise ValueError(
                f"the adapter is for {name!r}, a {kind.__module__}.{kind.__name__}: LoRALinear "
                f"stands for a torch.nn.Linear alone; load it with peft and call "
                f"peft_kernels.accelerate on the model"
            )
        if module.weight.is_meta:
            raise ValueError(f"{name!r} is on the meta device: load or initialise the model first")
        if not isinstance(module, LoRALinear) and files.sharded(module.weight):
            raise ValueError(
                f"{name!r} is sharded already: load the adapter, or place LoRALinear layers, "
                f"before fully_shard or parallelize_module"
            )
        if isinstance(module, LoRALinear) and module.merged:
            raise ValueError(f"{name!r} is merged: unmerge it before it gets other factors")
    others = [
        name
        for name, each in modules.items()
        if isinstance(each.module, LoRALinear) and name not in names
    ]
    if others:
        raise ValueError(
            f"the model has LoRA layers that the adapter has not: {', '.join(others)}; they would "
            f"keep what they hold"
        )
