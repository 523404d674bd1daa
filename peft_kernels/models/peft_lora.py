"""LoRA layers of peft on fused kernels: the same objects with another forward."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.lora.op import lora_linear
from peft_kernels.models.found import PLAIN
from peft_kernels.models.found import hooked as _hooked

_BASES = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Conv1D)
_PLAIN_TENSORS = (Tensor, nn.Parameter)


class FusedLinear(lora.Linear):
    """peft's LoRA layer of an ``nn.Linear``, or of GPT-2's ``Conv1D``, by ``lora_linear``.

    What the kernel does not take runs peft's own forward, call by call: see ``_adapter_of``.
    """

    op = "lora_linear"

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Return why no call of ``layer``, as it is now, would be fused; None if some would."""
        base = layer.base_layer
        if type(base) not in _BASES:
            return f"its base layer is a {type(base).__module__}.{type(base).__qualname__}"
        if _hooked(base):
            return "its base layer has hooks or a forward of its own (offloading)"
        for name in layer.active_adapters:
            variant = layer.lora_variant.get(name)
            if variant is not None:
                return f"adapter {name!r} is a {type(variant).__name__}"
            factor = layer.lora_A[name].weight if name in layer.lora_A else base.weight
            if factor.device != base.weight.device:
                return f"adapter {name!r} is on {factor.device}, its layer on {base.weight.device}"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what peft's forward returns, to the rounding of the base's dtype."""
        names = self._adapters_of(x, args, kwargs)
        if not names:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        first, *others = names
        scale = self.scaling[first]
        down, up = self._factors(first)
        bias = base.bias
        if up.bias is not None:
            added = up.bias * scale
            bias = added if bias is None else bias + added
        y = lora_linear(
            x, weight, down.weight, up.weight, bias,
            scale=scale, dropout_p=_dropout_p(self.lora_dropout[first]),
        )  # fmt: skip
        dtype = y.dtype
        for name in others:
            down, up = self._factors(name)
            low = down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype)))
            y = y + up(low) * self.scaling[name]
        return y.to(dtype) if others else y

    def _factors(self, name: str) -> tuple[Any, Any]:
        return self.lora_A[name], self.lora_B[name]

    def _adapters_of(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> list[str]:
        """Return the adapters to apply by the kernel, none where peft's forward must run.

        That is so while the layer is disabled or merged, where a call brings arguments of its own
        (several adapters in one batch), where an adapter is a variant of LoRA, where hooks are
        waiting on a module whose weight would be read without calling it (offloading, FSDP on
        the factors, ZeRO), and where parameters are sharded or narrower than the base's.
        """
        if self.disable_adapters or self.merged or args:
            return []
        if any(value is not None for value in kwargs.values()):
            return []
        base: Any = self.base_layer
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names or self.lora_variant.keys() & set(names) or type(base) not in _BASES:
            return []
        down, up = self._factors(names[0])
        dropout = self.lora_dropout[names[0]]
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return []
        if any(type(each) is not nn.Linear for each in (down, up)):
            return []
        if any(_hooked(each) for each in (base, down, up, dropout)):
            return []
        for factor in (down.weight, up.weight):
            if type(factor) not in _PLAIN_TENSORS or factor.device != base.weight.device:
                return []
            if torch.promote_types(factor.dtype, base.weight.dtype) is not factor.dtype:
                return []
        return names if type(base.weight) in _PLAIN_TENSORS else []


setattr(FusedLinear, PLAIN, lora.Linear)


def _dropout_p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
