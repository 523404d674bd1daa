"""Bottlenecks in adapters' format: ``AdaptedModule`` layers to a folder and back.

adapters knows a bottleneck by the layer of the model that it adapts, and has one set of options for
all of them. What it calls original_ln_before=False is an ``AdaptedModule``: the adapter is fed with
the output of the layer, before the model adds its own residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.adapter.layer import Adapter
from peft_kernels.models.checkpoints import adapters_format, files
from peft_kernels.models.checkpoints.adapters_format import Place, place_of
from peft_kernels.models.checkpoints.base_names import Based, based_modules
from peft_kernels.models.placement import AdaptedModule
from peft_kernels.models.replace import replace_named

NAME = "default"
_VERSION = "adapters.1.3.0"


def layers(model: nn.Module) -> list[Based]:
    """Return the adapted modules of a model."""
    return [each for each in based_modules(model) if isinstance(each.module, AdaptedModule)]


def save(
    model: nn.Module, folder: Path, base_model: str | None, task_type: str | None
) -> list[str]:
    """Write the bottlenecks of ``model`` as adapters does; return the names of what they adapt.

    adapters' settings say nothing of the task.
    """
    found: dict[str, Adapter] = {}
    places: dict[str, Place] = {}
    for name, _, module in layers(model):
        place = place_of(name)
        if place is None:
            raise ValueError(
                f"adapters has no layer for an adapter on {name!r}: it has those on BERT's "
                f"output.dense and attention.output.dense, and on a Llama's self_attn and mlp"
            )
        found[name], places[name] = module.adapter, place  # type: ignore[assignment]
    options = _one({name: _options(name, each) for name, each in found.items()})
    width = next(iter(found.values())).d_model
    switches = {(place.switch, place.number) for place in places.values()}
    indices = _indices(model)
    used = {index for _, index in switches}
    for switch, index in ((s, i) for s in {s for s, _ in switches} for i in used):
        if (switch, index) not in switches:
            raise ValueError(
                f"adapters puts the same bottlenecks into each layer that has some: {switch} is "
                f"missing in layer {index}"
            )
    settings = adapters_format.FIXED | options | {
        switch: any(each == switch for each, _ in switches)
        for switch in ("mh_adapter", "output_adapter")
    }  # fmt: skip
    settings["leave_out"] = sorted(int(index) for index in indices - used)
    config: Any = getattr(model, "config", None)
    written = {
        "config": settings, "hidden_size": width, "model_class": type(model).__name__,
        "model_name": base_model or "", "model_type": getattr(config, "model_type", None),
        "name": NAME, "version": _VERSION,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, layer in found.items():
        for key, tensor in _tensors(places[name].key, NAME, layer):
            if key in tensors:
                raise ValueError(f"two adapters of the model are one in adapters: {places[name]}")
            tensors[key] = tensor
    files.write(folder, files.ADAPTERS_TENSORS, written, tensors)
    return list(found)


def _indices(model: nn.Module) -> set[str]:
    """Return the numbers of the layers that could be adapted."""
    places = (place_of(each.name) for each in based_modules(model))
    return {place.number for place in places if place is not None}


def _options(name: str, layer: Adapter) -> dict[str, Any]:
    """Return adapters' words for a layer's options."""
    if layer.parallel:
        raise ValueError(
            f"{name!r} has a parallel adapter, fed with its own input: adapters feeds one with the "
            f"residual of the model"
        )
    if layer.down_bias is None:
        raise ValueError(f"{name!r} has an adapter without biases, which adapters' have")
    return {
        "adapter_residual_before_ln": layer.norm_after is not None,
        "dropout": layer.dropout,
        "init_weights": layer.init,
        "ln_after": layer.norm_after is not None,
        "ln_before": layer.norm_before is not None,
        "non_linearity": adapters_format.ACTIVATIONS[layer.activation],
        "reduction_factor": _reduction(layer.d_model, layer.bottleneck),
        "residual_before_ln": True,
        "scaling": _scaling(layer.scale),
    }


def _scaling(scale: float | Tensor) -> float | str:
    if isinstance(scale, Tensor):
        return "channel" if scale.dim() else "learned"
    return scale


def _reduction(width: int, bottleneck: int) -> float:
    """Return the factor from which adapters computes this bottleneck, max(1, int(width // f))."""
    if width % bottleneck == 0:
        return width // bottleneck
    # In the middle of those that give it: no rounding of the division reaches the next.
    return width / (bottleneck + 0.5)


def _one(options: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    first, given = next(iter(options.items()))
    for name, other in options.items():
        for key in given:
            if other[key] != given[key]:
                raise ValueError(
                    f"adapters has one {key} for all layers, not {given[key]} in {first!r} and "
                    f"{other[key]} in {name!r}"
                )
    return given


def _tensors(place: str, name: str, layer: Adapter) -> list[tuple[str, Tensor]]:
    """Return adapters' names of a layer's parameters, and these; a norm before has two names."""
    stem, down = f"{place}.adapters.{name}", int(layer.norm_before is not None)
    given: list[tuple[str, Any]] = [
        (f"adapter_down.{down}.weight", layer.down_weight),
        (f"adapter_down.{down}.bias", layer.down_bias),
        ("adapter_up.weight", layer.up_weight),
        ("adapter_up.bias", layer.up_bias),
    ]
    if isinstance(layer.scale, Tensor):
        given.append(("scaling", layer.scale if layer.scale.dim() else layer.scale.reshape(1)))
    norms = {"adapter_norm_before": layer.norm_before, "adapter_down.0": layer.norm_before,
             "adapter_norm_after": layer.norm_after}  # fmt: skip
    for key, norm in norms.items():
        if norm is not None:
            given += [(f"{key}.weight", norm.weight), (f"{key}.bias", norm.bias)]
    return [(f"{stem}.{key}", tensor) for key, tensor in given]


def load(model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Read what ``save`` or adapters wrote into ``model``; return the names of what is adapted."""
    options = adapters_format.checked(settings)
    targets: dict[str, Based] = {}
    for each in based_modules(model):
        place = place_of(each.name)
        wanted = (
            place is not None
            and options[place.switch]
            and int(place.number) not in options["leave_out"]
        )
        if isinstance(each.module, AdaptedModule):
            if place is None or not wanted:
                raise ValueError(f"the adapter in {folder} has nothing for that on {each.name!r}")
            targets[place.key] = each
        elif place is not None and wanted and each.name == place.wrapped:
            targets.setdefault(place.key, each)
    if not targets:
        raise ValueError(
            f"the adapter in {folder} names no layer of this {type(model).__name__}: is it the "
            f"model that the adapter was trained on?"
        )
    made = {key: _adapter(model, target, settings, options) for key, target in targets.items()}
    names = _fill(model, folder, str(settings["name"]), targets, made)
    for layer in made.values():
        layer.dropout = float(options["dropout"])
    return names


def _fill(
    model: nn.Module, folder: Path, name: str, targets: Mapping[str, Based],
    made: Mapping[str, Adapter],
) -> list[str]:  # fmt: skip
    path = folder / files.ADAPTERS_TENSORS
    prefix = _prefix(model, files.tensor_names(path))
    own = {key: dict(_tensors(key, name, layer)) for key, layer in made.items()}
    expected = {prefix(k): tuple(t.shape) for each in own.values() for k, t in each.items()}
    tensors = files.read_tensors(path, expected)
    for key, layer in made.items():
        if not isinstance(targets[key].module, AdaptedModule):
            kinds = [tensors[prefix(k)].dtype for k in own[key]] + [layer.down_weight.dtype]
            layer.to(max(kinds, key=lambda kind: torch.finfo(kind).bits))
        for k, parameter in _tensors(key, name, layer):
            files.fill(parameter, tensors[prefix(k)])
    new = {k: each for k, each in targets.items() if not isinstance(each.module, AdaptedModule)}
    keys = {id(each.module): key for key, each in new.items()}
    paths = [each.path for each in new.values()]
    replace_named(model, paths, lambda old: AdaptedModule(old, made[keys[id(old)]]))
    return [each.name for each in targets.values()]


def _prefix(model: nn.Module, saved: list[str]) -> Callable[[str], str]:
    """Return what turns a name in this model into one in the file.

    One of the two may be of a base model and the other of a model with a head around it.
    """
    base = getattr(model, "base_model_prefix", "") + "."
    if base == "." or not saved:
        return lambda key: key
    if not hasattr(model, base[:-1]) and all(key.startswith(base) for key in saved):
        return lambda key: base + key
    if hasattr(model, base[:-1]) and not any(key.startswith(base) for key in saved):
        return lambda key: key.removeprefix(base)
    return lambda key: key


def _adapter(
    model: nn.Module, target: Based, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> Adapter:
    """Return the adapter to fill: that of a module that has one, if it computes the same."""
    width = files.option(settings, "hidden_size", (int,), 0)
    if isinstance(target.module, AdaptedModule):
        layer: Any = target.module.adapter
        own = _options(target.name, layer)
        for key in ("ln_after", "ln_before", "non_linearity", "scaling"):
            theirs = options[key]
            same = own[key] == theirs or (
                key == "non_linearity"
                and adapters_format.OF_ADAPTERS.get(theirs) == layer.activation
            )
            if not same:
                raise ValueError(
                    f"{target.name!r} has an adapter with {key}={own[key]!r}, the file has "
                    f"{theirs!r}"
                )
        return layer
    # The next parameter up: a dropout, which may be what is adapted, has none.
    parent = model.get_submodule(target.path.rpartition(".")[0])
    weight = next(parent.parameters())
    if weight.is_meta:
        raise ValueError(f"{target.name!r} is on the meta device: load or initialise it first")
    return Adapter(
        width, reduction_factor=options["reduction_factor"],
        activation=adapters_format.OF_ADAPTERS[options["non_linearity"]], scale=options["scaling"],
        dropout=options["dropout"], layer_norm_before=options["ln_before"],
        layer_norm_after=options["ln_after"], device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
