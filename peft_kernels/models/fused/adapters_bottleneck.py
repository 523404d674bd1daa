"""Bottlenecks of adapters on the fused kernel: the same objects with another forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from adapters.methods import modeling
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from torch import Tensor, nn

from peft_kernels.adapter.op import adapter
from peft_kernels.models.fused.found import PLAIN, Found, hooked

# By the name of the class, in torch or transformers: what computes the same.
_ACTIVATIONS = {
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "Identity": "identity",
    "LinearActivation": "identity",
    "MishActivation": "mish",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}
_PLAIN_TENSORS = (Tensor, nn.Parameter)


class _Fused(nn.Module):
    """What the two forms of the bottleneck have in common."""

    op = "adapter"
    # The parallel form adds its residual itself, after its forward.
    adds_residual = True

    @staticmethod
    def why_not(layer: Any, fusions: nn.ModuleDict) -> str | None:
        """Return why no call of ``layer``, as it is now, would be fused; None if some would.

        Args:
            layer: a bottleneck.
            fusions: the AdapterFusion layers beside it, by the names of the adapters they fuse.
        """
        if layer.use_gating:
            return "it has a gate"
        if hasattr(layer, "DropPath"):
            return "it has stochastic depth"
        if any(layer.name in names.split(",") for names in fusions):
            return "it is part of an AdapterFusion, which reads its output before the residual"
        *_, down, activation = layer.adapter_down
        for each in (down, layer.adapter_up):
            if type(each) is not nn.Linear:
                return f"it has a {type(each).__name__}"
        if _activation(activation) is None:
            return f"its non-linearity, {activation.f}, has no kernel"
        if type(layer.dropout) is not nn.Dropout:
            return f"its dropout is a {type(layer.dropout).__name__}"
        if any(
            map(hooked, (down, activation, layer.adapter_down, layer.adapter_up, layer.dropout))
        ):
            return "a part of it has hooks or a forward of its own (offloading)"
        return None

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> Any:
        """Return (what the bottleneck's own forward returns first, None, None).

        The other two of the own forward are for AdapterFusion, whose parts run their own.
        """
        if not self._takes(x):
            return super().forward(x, residual_input, output_gating)
        layer: Any = self
        *norms, down, activation = layer.adapter_down
        below = x
        for norm in norms:
            below = norm(below)
        residual = residual_input if self.adds_residual else None
        first = layer.adapter_residual_before_ln or not layer.add_layer_norm_after
        # The kernel's sum is of the dtype that it computes in: a wider residual is added to it.
        inside = residual is not None and first and residual.dtype is _computed_in(below)
        own: Any = "input" if residual is below else residual
        y = adapter(
            below, down.weight, layer.adapter_up.weight, down.bias, layer.adapter_up.bias,
            activation=_activation(activation) or "", scale=layer.scaling,
            residual=own if inside else None, dropout_p=layer.dropout.p,
            training=layer.dropout.training,
        )  # fmt: skip
        if residual is not None and first and not inside:
            y = y + residual
        if layer.add_layer_norm_after:
            y = layer.adapter_norm_after(y)
        if residual is not None and not first:
            y = y + residual
        return y, None, None

    def _takes(self, x: Tensor) -> bool:
        """Return whether the kernel computes what the own forward would, in the same dtypes."""
        layer: Any = self
        if self.why_not(layer, layer.peft_kernels_fusions) is not None:
            return False
        *_, down, _ = layer.adapter_down
        up = layer.adapter_up
        tensors = [x, down.weight, down.bias, up.weight, up.bias]
        computed_in = _computed_in(x)
        if isinstance(layer.scaling, Tensor):
            tensors.append(layer.scaling)
            # Eager PyTorch multiplies in the wider dtype, under autocast too.
            if layer.scaling.dtype is not computed_in:
                return False
        if any(type(each) not in _PLAIN_TENSORS for each in tensors):
            return False
        if torch.is_autocast_enabled(x.device.type):
            # Which leaves float64 as it is.
            return all(each.dtype is not torch.float64 for each in tensors)
        return all(each.dtype is x.dtype for each in tensors)

    def _peft_kernels_acquired(self, holder: Any) -> None:
        # Beside the modules, not among them: it is the holder's.
        self.__dict__["peft_kernels_fusions"] = holder.adapter_fusion_layer

    def _peft_kernels_released(self) -> None:
        del self.__dict__["peft_kernels_fusions"]


class FusedAdapter(_Fused, modeling.Adapter):
    """adapters' sequential bottleneck by ``adapter``, layer norms around it in plain PyTorch."""


class FusedParallelAdapter(_Fused, modeling.ParallelAdapter):
    """adapters' parallel bottleneck by ``adapter``; its residual is added after it."""

    adds_residual = False


setattr(FusedAdapter, PLAIN, modeling.Adapter)
setattr(FusedParallelAdapter, PLAIN, modeling.ParallelAdapter)
_SERVED: dict[type, Any] = {
    each.__dict__[PLAIN]: each for each in (FusedAdapter, FusedParallelAdapter)
}


def find(model: nn.Module) -> Iterator[Found]:
    """Yield every bottleneck that adapters made, and its other layers that hold an adapter."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, AdapterLayerBase):
            continue
        own: Any = module
        held = getattr(own, own.adapter_modules_name, None) or {}
        if not isinstance(module, BottleneckLayer):
            if len(held):
                kind = f"{type(own).__module__}.{type(own).__qualname__}"
                yield Found(name, own, "", None, f"no kernel for {kind}")
            continue
        for adapter_name, layer in held.items():
            yield _found(f"{name}.{own.adapter_modules_name}.{adapter_name}", layer, own)


def _found(name: str, layer: nn.Module, holder: Any) -> Found:
    kind = type(layer)
    fused = _SERVED.get(kind.__dict__.get(PLAIN, kind))
    if fused is None:
        return Found(name, layer, "", None, f"no kernel for {kind.__module__}.{kind.__qualname__}")
    reason = fused.why_not(layer, holder.adapter_fusion_layer)
    return Found(name, layer, fused.op, None if reason else fused, reason or "", holder)


def _activation(module: Any) -> str | None:
    """Return the kernel's name of a non-linearity, None where it has none."""
    function = getattr(module, "f", None)
    if function is nn.functional.leaky_relu:
        return "leaky_relu"
    if type(function) is nn.LeakyReLU:
        return "leaky_relu" if function.negative_slope == 0.01 else None
    return _ACTIVATIONS.get(type(function).__name__)


def _computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype of the products of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
