"""``LoRALinear``: ``nn.Linear`` with a frozen weight and a trained low-rank update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.core import backend as backends
from peft_kernels.core.checks import check_probability
from peft_kernels.lora import op


class LoRALinear(nn.Module):
    """``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ``, a drop-in for ``nn.Linear``.

    ``weight`` and ``bias`` are frozen, ``lora_A`` and ``lora_B`` are trained. A starts from the
    Kaiming-uniform initialisation and B from zero, so that training starts at the base layer.

    Args:
        in_features: K.
        out_features: N.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling; scaling = lora_alpha / r.
        lora_dropout: drop probability of the low-rank branch's input, in [0, 1).
        use_rslora: scaling = lora_alpha / sqrt(r) (Kalajdzievski, 2023).
        bias: whether the base layer has a bias.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Attributes:
        weight: frozen, [N, K].
        bias: frozen, [N], or None.
        lora_A: [r, K].
        lora_B: [N, r].
        merged: whether the update currently lies in ``weight``.
        backend: None, or the name of a backend to demand.

    Raises:
        ValueError: a rank below 1, or a dropout outside [0, 1).

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022.

    Example:
        >>> import torch
        >>> from peft_kernels import LoRALinear
        >>> layer = LoRALinear.from_linear(torch.nn.Linear(32, 16), r=8, lora_alpha=16)
        >>> layer(torch.randn(4, 32)).shape
        torch.Size([4, 16])
        >>> sorted(name for name, p in layer.named_parameters() if p.requires_grad)
        ['lora_A', 'lora_B']
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer with a freshly initialised base."""
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_from(base, r, lora_alpha, lora_dropout, use_rslora, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """Wrap ``linear``, sharing its weight and bias and freezing both.

        ``replace`` puts the layer into a model; by hand, ``nn.TransformerEncoderLayer`` must be
        told not to read its weight past it (``replace`` turns off that fast path of inference).

        Args:
            linear: the base layer; its parameters become this layer's, not copies.
            r: rank.
            lora_alpha: numerator of the scaling.
            lora_dropout: drop probability in [0, 1).
            use_rslora: scaling = lora_alpha / sqrt(r).
            dtype: dtype of A and B; None takes the weight's. float32 beside a bfloat16 weight is
                peft's default.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear`` (a subclass may compute something
                else, a quantised one stores something else).
            ValueError: its weight is not a parameter (pruned, weight-normalised), or it has forward
                hooks.
        """
        if type(linear) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"from_linear takes a torch.nn.Linear, got {type(linear).__module__}."
                f"{type(linear).__name__}, whose forward may differ; wrap its nn.Linear instead"
            )
        if not isinstance(linear.weight, nn.Parameter):
            raise ValueError(
                f"linear.weight is no parameter but made anew from others, as by torch.nn.utils."
                f"prune or weight_norm: remove that first, so that the weight is one, got "
                f"{sorted(name for name, _ in linear.named_parameters())}"
            )
        if linear._forward_hooks or linear._forward_pre_hooks:
            raise ValueError(
                "linear has forward hooks, which the new layer would not run: remove them, and "
                "register them on that layer"
            )
        layer = cls.__new__(cls)
        layer._init_from(linear, r, lora_alpha, lora_dropout, use_rslora, dtype)
        layer.train(linear.training)
        return layer

    def _init_from(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        dtype: torch.dtype | None,
    ) -> None:
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be an integer of at least 1, got {r!r}")
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout = check_probability("lora_dropout", lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.merged = False
        self.backend: str | None = None
        self.weight = base.weight.requires_grad_(False)
        self.register_parameter("bias", None if base.bias is None else base.bias)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        options: dict[str, Any] = {
            "device": self.weight.device,
            "dtype": dtype or self.weight.dtype,
        }
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Initialise A by Kaiming-uniform (a = sqrt(5), as ``nn.Linear`` does) and B by zeros."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., N] for x [..., K].

        Raises:
            RuntimeError: the layer is merged and A or B would be trained.
        """
        if self.merged:
            return self._forward_merged(x)
        return op.lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scale=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            backend=self.backend,
        )

    def _forward_merged(self, x: Tensor) -> Tensor:
        trained = self.lora_A.requires_grad or self.lora_B.requires_grad
        if self.training and trained and torch.is_grad_enabled():
            raise RuntimeError(
                "this LoRALinear is merged: its output no longer depends on lora_A and lora_B, so "
                "they would get no gradient. Call .unmerge() to train, or .eval() to infer"
            )
        return nn.functional.linear(x, self.weight, self.bias)

    def delta_weight(self) -> Tensor:
        """Return the update ``scaling · B A``, [N, K], in float32 (float64 for float64 factors)."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to ``weight``, in place, so that inference costs one matmul.

        A layer made by ``from_linear`` shares its weight: whoever else holds it sees the merge. The
        state dict of a merged layer holds the merged weight and does not say so: unmerge before
        saving what another layer is to load.

        Raises:
            RuntimeError: already merged, or the result would not be finite.
        """
        if self.merged:
            raise RuntimeError("this LoRALinear is merged already; call .unmerge() first")
        merged = self._weight_plus(self.delta_weight())
        if not merged.isfinite().all():
            raise RuntimeError("merging gives a weight that is not finite; nothing was changed")
        self.weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of ``weight`` again; exact to one rounding of the weight's dtype.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError("this LoRALinear is not merged; call .merge() first")
        self.weight.copy_(self._weight_plus(-self.delta_weight()))
        self.merged = False

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            error_msgs.append(
                f"{prefix.removesuffix('.') or 'this LoRALinear'} is merged: its weight holds the "
                f"update; call .unmerge() before loading, and merge again"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _weight_plus(self, delta: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, delta.dtype)
        return (self.weight.to(wide) + delta.to(wide)).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return what ``print(layer)`` shows."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha}"
        )
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout}"
        if self.use_rslora:
            text += ", use_rslora=True"
        return text + (", merged=True" if self.merged else "")


def _explain(layer: LoRALinear, x: Tensor) -> tuple[backends.Op, op.LoRASpec, str | None]:
    return op.explain_call(
        x,
        layer.weight,
        layer.lora_A,
        layer.lora_B,
        layer.bias,
        scale=layer.scaling,
        dropout_p=layer.lora_dropout,
        training=layer.training,
        backend=layer.backend,
    )


backends.explains(LoRALinear, _explain)
