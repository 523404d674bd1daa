"""What a tensor-parallel style needs to know of a LoRA layer: ours, or peft's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from peft_kernels.lora.layer import LoRALinear

ROLES = ("weight", "bias", "lora_A", "lora_B")


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (what it is, the module that holds it, its name there, itself) of each parameter.

    In peft's layer, A is ``lora_A.<adapter>.weight`` and the base ``base_layer.weight``.
    """
    for path, owner in module.named_modules():
        outer = path.partition(".")[0]
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            role = outer if outer in ("lora_A", "lora_B") and key == "weight" else key
            if outer not in ("", "base_layer", "lora_A", "lora_B") or role not in ROLES:
                raise ValueError(
                    f"{type(module).__name__} holds {path}.{key}, which has no place in a "
                    f"tensor-parallel LoRA layer (DoRA and other variants have none)"
                )
            yield role, owner, key, parameter


def _peft_linear() -> type[nn.Module] | None:
    """Return peft's LoRA layer, without importing peft: a model that has one has imported it."""
    return getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)


def check_layer(module: nn.Module) -> None:
    """Raise TypeError or ValueError unless ``module`` is a LoRA layer that ranks can share."""
    peft_linear = _peft_linear()
    if isinstance(module, LoRALinear):
        return
    if peft_linear is None or not isinstance(module, peft_linear):
        raise TypeError(
            f"LoRAColwiseParallel and LoRARowwiseParallel take a LoRALinear or peft's LoRA Linear, "
            f"got {type(module).__module__}.{type(module).__name__}; torch's ColwiseParallel and "
            f"RowwiseParallel take an nn.Linear"
        )
    base: Any = module.base_layer
    if type(base) is not nn.Linear:
        raise ValueError(
            f"the base layer of a tensor-parallel LoRA layer must be an nn.Linear, got "
            f"{type(base).__module__}.{type(base).__name__}"
        )
    if module.lora_variant:
        raise ValueError(
            f"only plain LoRA can be tensor-parallel, this layer has variants: "
            f"{', '.join(map(str, module.lora_variant))}"  # type: ignore[arg-type]
        )


def refuse_own_dropout(module: nn.Module) -> None:
    """Refuse peft's own dropout in training: each rank would draw from its own generator."""
    peft_linear = _peft_linear()
    if not module.training or peft_linear is None or not isinstance(module, peft_linear):
        return
    if type(module).forward is not peft_linear.forward:  # accelerated: dropout has a seed
        return
    dropouts = module.lora_dropout.values()  # type: ignore[operator]
    if any(getattr(each, "p", 0.0) for each in dropouts):
        raise ValueError(
            "a tensor-parallel layer of peft computes its dropout by nn.Dropout, whose masks do "
            "not fit together over the ranks: accelerate the model first, or set lora_dropout=0"
        )
