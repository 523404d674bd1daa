"""LoRA layers of peft on fused kernels: the same objects with another forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.lora.dora import dora_linear
from peft_kernels.lora.op import lora_linear
from peft_kernels.models.fused.found import PLAIN, hooked
from peft_kernels.models.fused.projections import GROUP, Projection, Projections

_BASES = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Conv1D)
_PLAIN_TENSORS = (Tensor, nn.Parameter)


class FusedLinear(lora.Linear):
    """peft's LoRA layer of an ``nn.Linear``, or of GPT-2's ``Conv1D``, by ``lora_linear``.

    DoRA adapters run by ``dora_linear``. What neither takes runs peft's own forward, call by call:
    see ``_adapters_of``.
    """

    @staticmethod
    def op_of(layer: Any) -> str:
        """Return the name of the function that serves ``layer``, as it is now."""
        variants = [layer.lora_variant.get(name) for name in layer.active_adapters]
        return "dora_linear" if any(map(_is_dora, variants)) else "lora_linear"

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Return why no call of ``layer``, as it is now, would be fused; None if some would."""
        base = layer.base_layer
        if type(base) not in _BASES:
            return f"its base layer is a {type(base).__module__}.{type(base).__qualname__}"
        if hooked(base):
            return "its base layer has hooks or a forward of its own (offloading)"
        for name in layer.active_adapters:
            variant = layer.lora_variant.get(name)
            if variant is not None and not _is_dora(variant):
                return f"adapter {name!r} is a {type(variant).__name__}"
            scale = layer.scaling.get(name, 1.0)
            if not is_served_scale(scale, base.weight.device):
                return f"adapter {name!r} has the scaling {scale!r}"
            factor = layer.lora_A[name].weight if name in layer.lora_A else base.weight
            if factor.device != base.weight.device:
                return f"adapter {name!r} is on {factor.device}, its layer on {base.weight.device}"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what peft's forward returns, to the rounding of the base's dtype."""
        group: Projections | None = self.__dict__.get(GROUP)
        if group is not None and not torch.compiler.is_compiling():
            shared = group.result(self, x, args, kwargs)
            if shared is not None:
                return shared
        names = self._adapters_of(x, args, kwargs)
        if not names:
            return super().forward(x, *args, **kwargs)
        first, *others = names
        given = self._arguments(first)
        if first in self.lora_variant:
            # Beside a layer that does not train, peft leaves out the dropout of DoRA.
            magnitude: Any = self.lora_magnitude_vector[first]
            scale: Any = given.scale
            y = dora_linear(
                x, given.weight, given.lora_a, given.lora_b, magnitude.weight, given.bias,
                scale=scale, dropout_p=given.dropout_p if self.training else 0.0,
            )  # fmt: skip
        else:
            y = lora_linear(
                x, given.weight, given.lora_a, given.lora_b, given.bias,
                scale=given.scale, dropout_p=given.dropout_p,
            )  # fmt: skip
        dtype = y.dtype
        for name in others:
            down, up = self._factors(name)
            low = down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype)))
            y = y + up(low) * self.scaling[name]
        return y.to(dtype) if others else y

    def _mixed_batch_forward(
        self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        """Return y of a batch whose rows name their adapters, by one kernel call for each.

        peft's forward calls it, with what it has checked. Rows of "__base__", or of an adapter that
        this layer does not have, are the base layer's alone.
        """
        places: dict[str, list[int]] = {}
        for place, name in enumerate(adapter_names):
            places.setdefault(name, []).append(place)
        known: Any = self.lora_A
        adapted = [name for name in places if name in known]
        plain = adapted and not args and all(value is None for value in kwargs.values())
        if not plain or not all(n not in self.lora_variant and self._fits(n) for n in adapted):
            mixed: Tensor = super()._mixed_batch_forward(
                x, *args, adapter_names=adapter_names, **kwargs
            )
            return mixed
        parts = []
        for name, rows in places.items():
            part = x[rows]
            if name in adapted:
                given = self._arguments(name)
                y = lora_linear(
                    part, given.weight, given.lora_a, given.lora_b, given.bias,
                    scale=given.scale, dropout_p=given.dropout_p,
                )  # fmt: skip
                parts.append(y)
            else:
                parts.append(self.base_layer(part))
        order = [row for rows in places.values() for row in rows]
        where = torch.tensor(order, device=x.device).argsort()
        return torch.cat(parts).index_select(0, where)

    def projection(self, x: Tensor) -> Projection | None:
        """Return what the kernel is given beside x, None where it does not serve the whole call.

        Nor where the factors are inference tensors, whose changes are not counted, or the scaling
        is a tensor.
        """
        names = self._adapters_of(x, (), {})
        if len(names) != 1 or names[0] in self.lora_variant:
            return None
        given = self._arguments(names[0])
        if isinstance(given.scale, Tensor):
            return None
        return None if given.lora_a.is_inference() or given.lora_b.is_inference() else given

    def state(self) -> list[Any]:
        """Return what the result of a call depends on beside x: two equal ones, the same result.

        So far as tensors are alive between the two, told by their addresses.
        """
        active = self.active_adapters
        found = [*active, self._disable_adapters, len(self.merged_adapters), self.training]
        known: Any = self._modules["lora_A"]
        for name in active:
            if name in known._modules:
                found.append(self.scaling[name])
                for factor in self._factors(name):
                    weight = _parameter(factor, "weight")
                    found += id(weight), weight._version
        return found

    def _arguments(self, name: str) -> Projection:
        modules = self._modules
        base: Any = modules["base_layer"]
        weight = _parameter(base, "weight")
        if isinstance(base, Conv1D):
            weight = weight.t()
        scale = self.scaling[name]
        down, up = self._factors(name)
        bias, up_bias = _parameter(base, "bias"), _parameter(up, "bias")
        if up_bias is not None:
            added = up_bias * scale
            bias = added if bias is None else bias + added
        factors = _parameter(down, "weight"), _parameter(up, "weight")
        dropout_p = _dropout_p(_named(modules["lora_dropout"], name))
        return Projection(weight, *factors, bias, scale, dropout_p)

    def _factors(self, name: str) -> tuple[Any, Any]:
        modules = self._modules
        return _named(modules["lora_A"], name), _named(modules["lora_B"], name)

    def _adapters_of(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> list[str]:
        """Return the adapters to apply by the kernel, none where peft's forward must run.

        That is so while the layer is disabled or merged, where a call brings arguments of its own
        (of several adapters in one batch: ``_mixed_batch_forward``) or a nested tensor, where an
        adapter is a variant of LoRA (but for DoRA as the first one: a later one acts on the sum of
        those before), where a scaling is not finite or a dropout drops everything, where hooks are
        waiting on a module whose weight would be read without calling it (offloading, FSDP on the
        factors, ZeRO), and where parameters are sharded or narrower than the base's.
        """
        if self._disable_adapters or self.merged_adapters or args:
            return []
        if kwargs and any(value is not None for value in kwargs.values()):
            return []
        if getattr(x, "is_nested", False):
            return []
        variants = self.lora_variant
        known: Any = self._modules["lora_A"]
        names = [name for name in self.active_adapters if name in known._modules]
        if not names or (variants and variants.keys() & set(names[1:])):
            return []
        return names if self._fits(names[0]) else []

    def _fits(self, name: str) -> bool:
        """Return whether the kernel may be given the parameters of an adapter and of the base."""
        submodules, variants = self._modules, self.lora_variant
        base: Any = submodules["base_layer"]
        if type(base) not in _BASES:
            return False
        down, up = self._factors(name)
        dropout = _named(submodules["lora_dropout"], name)
        if type(dropout) not in (nn.Identity, nn.Dropout) or not _drops_some(dropout):
            return False
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return False
        modules = [base, down, up, dropout]
        factors = [_parameter(down, "weight"), _parameter(up, "weight")]
        if name in variants:
            magnitude = self._magnitude(name)
            if magnitude is None:
                return False
            modules.append(magnitude)
            factors.append(magnitude.weight)
        for module in modules:
            if hooked(module):
                return False
        weight = _parameter(base, "weight")
        if type(weight) not in _PLAIN_TENSORS:
            return False
        device, dtype = weight.device, weight.dtype
        scale = self.scaling[name]
        if not is_served_scale(scale, device) or (name in variants and isinstance(scale, Tensor)):
            return False
        for factor in factors:
            if type(factor) not in _PLAIN_TENSORS or factor.device != device:
                return False
            own = factor.dtype
            if own is not dtype and torch.promote_types(own, dtype) is not own:
                return False
        return True

    def _magnitude(self, name: str) -> Any:
        """Return what holds the magnitude of an adapter that is a plain DoRA, else None."""
        if not _is_dora(self.lora_variant[name]) or self.lora_B[name].bias is not None:
            return None
        if self.fan_in_fan_out != isinstance(self.base_layer, Conv1D):
            return None
        magnitude: Any = self.lora_magnitude_vector[name]
        return magnitude if type(magnitude) is DoraLinearLayer else None

    def _peft_kernels_released(self) -> None:
        self.__dict__.pop(GROUP, None)


setattr(FusedLinear, PLAIN, lora.Linear)


def _named(modules: Any, name: str) -> Any:
    """Return an adapter's part of a ``ModuleDict``."""
    # Indexing it runs nn.Module.__getattr__ and an abstract method: a tenth of a layer's host time.
    return modules._modules[name]


def _parameter(module: Any, name: str) -> Any:
    """Return ``module.weight`` or the like: a parameter as a rule, without the detour."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_served_scale(scale: Any, device: torch.device) -> bool:
    """Return whether the kernel takes a scaling: a finite number, or what peft makes of one.

    ``prepare_model_for_compiled_hotswap`` makes it a tensor, and then changes that in place.
    """
    if isinstance(scale, (int, float)):
        return torch.compiler.is_compiling() or math.isfinite(scale)
    if type(scale) not in _PLAIN_TENSORS or scale.requires_grad:
        return False
    return scale.numel() == 1 and scale.dtype == torch.float32 and scale.device == device


def _drops_some(dropout: nn.Module) -> bool:
    return not isinstance(dropout, nn.Dropout) or dropout.p < 1.0 or not dropout.training


def _is_dora(variant: Any) -> bool:
    # Exactly: subclasses of it compute something else.
    return type(variant) is DoraLinearVariant


def _dropout_p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
