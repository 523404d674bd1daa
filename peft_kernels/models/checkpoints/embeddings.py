"""Embeddings of the base model that travel with a LoRA adapter, as peft lets them.

It saves them beside the factors where one of them is a target, or the vocabulary has grown, and
takes them from there. A module whose parameters came with an adapter is marked, so that they go
with it when it is saved again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from peft_kernels.lora.layer import LoRALinear
from peft_kernels.models.checkpoints import files
from peft_kernels.models.checkpoints.base_names import Based, based_modules

PREFIX = "base_model.model."
_MARK = "_peft_kernels_came_with_adapter"
# Where peft finds the parameters: of a module as it is, and of one that is a target.
_PLACES = ("", ".base_layer")
_PARAMETERS = ("weight", "bias")


def loadable(model: nn.Module, modules: Mapping[str, Based]) -> dict[str, Tensor]:
    """Return the parameters of the input and output embeddings by the names peft gives them."""
    return {
        f"{PREFIX}{name}{place}.{parameter}": value
        for name in _names(model)
        for parameter, value in _parameters(modules[name].module).items()
        for place in _PLACES
    }


def check(found: Mapping[str, Tensor], saved: Collection[str]) -> None:
    """Raise where the file has values for a parameter that cannot hold them."""
    for key in found.keys() & saved:
        name, parameter = key.removeprefix(PREFIX), found[key]
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load or initialise the model first")
        if not parameter.is_floating_point():
            raise ValueError(
                f"the adapter brings its own {name}, which is {parameter.dtype} in this model: a "
                f"quantised one cannot take it; load the model without quantising this module"
            )


def fill(
    modules: Mapping[str, Based], found: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Copy the file's embeddings into a checked model, and mark the modules that hold them."""
    for key in found.keys() & tensors:
        files.fill(found[key], tensors[key])
        name = key.removeprefix(PREFIX).rpartition(".")[0].removesuffix(".base_layer")
        setattr(modules[name].module, _MARK, True)


def saved_with(modules: Mapping[str, Based]) -> dict[str, Tensor]:
    """Return the parameters that came with an adapter, by the names peft gives them."""
    tensors: dict[str, Tensor] = {}
    for name, (_, _, module) in modules.items():
        if not getattr(module, _MARK, False):
            continue
        target = isinstance(module, LoRALinear)
        if target and module.merged:
            raise ValueError(
                f"{name!r} is merged, and its weight belongs to the adapter, which brought it: "
                f"unmerge it before saving"
            )
        for parameter, value in _parameters(module).items():
            tensors[f"{PREFIX}{name}{_PLACES[target]}.{parameter}"] = value
    return tensors


def _names(model: nn.Module) -> list[str]:
    names = []
    for of in ("get_input_embeddings", "get_output_embeddings"):
        module = None
        with contextlib.suppress(NotImplementedError):  # of a model without words
            module = getattr(model, of, lambda: None)()
        # By what the model holds, which may be a wrapper around the module of that name.
        names += [each.name for each in based_modules(model) if each.module is module][:1]
    return names


def _parameters(module: Any) -> dict[str, Tensor]:
    found = {name: getattr(module, name, None) for name in _PARAMETERS}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
