"""LoRA embeddings of peft on fused kernels: the same objects with another forward."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from peft_kernels.lora.embedding import lora_embedding
from peft_kernels.models.fused.found import PLAIN, hooked
from peft_kernels.models.fused.peft_lora import _PLAIN_TENSORS, is_served_scale


class FusedEmbedding(lora.Embedding):
    """peft's LoRA layer of an ``nn.Embedding``, by ``lora_embedding``.

    What that does not take runs peft's own forward, call by call: see ``_adapters_of``.
    """

    @staticmethod
    def op_of(layer: Any) -> str:
        """Return the name of the function that serves ``layer``."""
        return "lora_embedding"

    @staticmethod
    def why_not(layer: Any) -> str | None:
        """Return why no call of ``layer``, as it is now, would be fused; None if some would."""
        base = layer.base_layer
        if type(base) is not nn.Embedding:
            # Among them Gemma's, which scales its rows.
            return f"its base layer is a {type(base).__module__}.{type(base).__qualname__}"
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            return "its base layer has max_norm, scale_grad_by_freq or sparse gradients"
        if hooked(base):
            return "its base layer has hooks or a forward of its own (offloading)"
        if layer.tp_layer is not None:
            return "its table is sharded (tensor parallel)"
        for name in layer.active_adapters:
            variant = layer.lora_variant.get(name)
            if variant is not None:
                return f"adapter {name!r} is a {type(variant).__name__}"
            scale = layer.scaling.get(name, 1.0)
            if not is_served_scale(scale, base.weight.device):
                return f"adapter {name!r} has the scaling {scale!r}"
            factor = layer.lora_embedding_A[name] if name in layer.lora_embedding_A else base.weight
            if factor.device != base.weight.device:
                return f"adapter {name!r} is on {factor.device}, its layer on {base.weight.device}"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what peft's forward returns, to the rounding of the table's dtype."""
        names = self._adapters_of(x, args, kwargs)
        if not names:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        first, *others = names
        y = lora_embedding(
            x, base.weight, self.lora_embedding_A[first], self.lora_embedding_B[first],
            scale=self.scaling[first], padding_idx=base.padding_idx,
        )  # fmt: skip
        dtype = y.dtype
        for name in others:
            low = self._embed(x, self.lora_embedding_A[name].T)
            y = y + (low @ self.lora_embedding_B[name].T) * self.scaling[name]
        return y.to(dtype) if others else y

    def _adapters_of(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> list[str]:
        """Return the adapters to apply by the kernel, none where peft's forward must run.

        As for ``FusedLinear``; and where the table renormalises its rows, has gradients that are
        counted or sparse, scales its rows, or is sharded.
        """
        if self.disable_adapters or self.merged or args or getattr(x, "is_nested", False):
            return []
        if any(value is not None for value in kwargs.values()):
            return []
        base: Any = self.base_layer
        names = [name for name in self.active_adapters if name in self.lora_embedding_A]
        if not names or self.lora_variant.keys() & set(names) or type(base) is not nn.Embedding:
            return []
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse or hooked(base):
            return []
        if hasattr(base, "embed_scale") or any(
            name in self.input_fns or name in self.output_fns for name in names
        ):
            return []
        weight = base.weight
        if not is_served_scale(self.scaling[names[0]], weight.device):
            return []
        for factor in (self.lora_embedding_A[names[0]], self.lora_embedding_B[names[0]]):
            if type(factor) not in _PLAIN_TENSORS or factor.device != weight.device:
                return []
            if torch.promote_types(factor.dtype, weight.dtype) is not factor.dtype:
                return []
        return names if type(weight) in _PLAIN_TENSORS and x.device == weight.device else []


setattr(FusedEmbedding, PLAIN, lora.Embedding)
