"""``Adapter``: the bottleneck adapter as an ``nn.Module``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.adapter import op
from peft_kernels.adapter.activations import check_activation
from peft_kernels.core import backend as backends
from peft_kernels.core.checks import check_probability, describe

INITS = ("bert", "mam_adapter", "houlsby")
LEARNED = ("learned", "channel")


class Adapter(nn.Module):
    """``y = residual + scale · dropout(act(x W_downᵀ + b_down) W_upᵀ + b_up)``.

    Called with x alone the residual is x; a parallel adapter is called with x, the input of the
    layer beside it, and ``residual``, that layer's output.

    Args:
        d_model: D, the width of x.
        bottleneck: r; None takes ``d_model // reduction_factor``, at least 1.
        reduction_factor: D / r where ``bottleneck`` is None; below 1 the bottleneck is wider.
        activation: as ``adapter`` names them.
        scale: a number, "learned" (one trained number, from 1) or "channel" (D of them, from 1).
        dropout: drop probability of the branch, in [0, 1).
        parallel: the layer must be called with ``residual``.
        bias: whether the two projections have biases.
        init: "bert" (weights from N(0, 0.02), biases zero), "mam_adapter" (down as ``nn.Linear``
            starts, up zero: the layer starts as its residual) or "houlsby" (weights from
            N(0, 0.01) cut at two deviations, biases zero).
        layer_norm_before: an ``nn.LayerNorm`` on x before it goes down (the residual stays x).
        layer_norm_after: an ``nn.LayerNorm`` on y.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Attributes:
        down_weight: [r, D].
        up_weight: [D, r].
        down_bias: [r], or None.
        up_bias: [D], or None.
        scale: a number, or a parameter of no dimension ("learned") or of [D] ("channel").
        norm_before: the LayerNorm before, or None.
        norm_after: the LayerNorm after, or None.
        backend: None, or the name of a backend to demand.

    Raises:
        TypeError: an option of another type.
        ValueError: an option outside its range, an unknown activation, scale or init.

    Source: Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, ICML 2019; Pfeiffer
    et al., *AdapterFusion*, EACL 2021; He et al., *Towards a Unified View of Parameter-Efficient
    Transfer Learning*, ICLR 2022.

    Example:
        >>> import torch
        >>> from peft_kernels import Adapter
        >>> layer = Adapter(64, reduction_factor=16, activation="gelu", init="mam_adapter")
        >>> x = torch.randn(3, 64)
        >>> layer.bottleneck, torch.equal(layer(x), x)
        (4, True)
    """

    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    scale: float | nn.Parameter

    def __init__(
        self,
        d_model: int,
        *,
        bottleneck: int | None = None,
        reduction_factor: float = 16,
        activation: str = "relu",
        scale: float | str = 1.0,
        dropout: float = 0.0,
        parallel: bool = False,
        bias: bool = True,
        init: str = "bert",
        layer_norm_before: bool = False,
        layer_norm_after: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer and initialise it."""
        super().__init__()
        self.d_model = _whole("d_model", d_model)
        self.bottleneck = _bottleneck(self.d_model, bottleneck, reduction_factor)
        self.activation = check_activation(activation)
        self.dropout = check_probability("dropout", dropout)
        self.parallel, self.backend = parallel, None
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        self.init = init
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **options))

        self.down_weight = parameter(self.bottleneck, self.d_model)
        self.up_weight = parameter(self.d_model, self.bottleneck)
        self.register_parameter("down_bias", parameter(self.bottleneck) if bias else None)
        self.register_parameter("up_bias", parameter(self.d_model) if bias else None)
        if isinstance(scale, str) and scale in LEARNED:
            self.scale = parameter(*(() if scale == "learned" else (self.d_model,)))
        else:
            self.scale = _number(scale)
        self.norm_before = nn.LayerNorm(self.d_model, **options) if layer_norm_before else None
        self.norm_after = nn.LayerNorm(self.d_model, **options) if layer_norm_after else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the projections as ``init`` says, a trained scale by ones."""
        weights, biases = (self.down_weight, self.up_weight), (self.down_bias, self.up_bias)
        if self.init == "mam_adapter":
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
            nn.init.zeros_(self.up_weight)
        for weight in weights:
            if self.init == "bert":
                nn.init.normal_(weight, std=0.02)
            elif self.init == "houlsby":
                nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
        for bias in biases:
            if bias is not None:
                nn.init.zeros_(bias)
        if isinstance(self.scale, Tensor):
            nn.init.ones_(self.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return y [..., D] for x [..., D] and, of the same shape, the residual to add to.

        Raises:
            ValueError: a parallel adapter was called without a residual.
        """
        if residual is None and self.parallel:
            raise ValueError(
                "a parallel Adapter needs residual, the output of the layer beside it: call "
                "adapter(x, residual=layer(x)), or make it with parallel=False"
            )
        below = x if self.norm_before is None else self.norm_before(x)
        added: Any = residual
        if residual is None:
            # What is normalised is not what is added.
            added = "input" if self.norm_before is None else x
        y = op.adapter(
            below,
            self.down_weight,
            self.up_weight,
            self.down_bias,
            self.up_bias,
            activation=self.activation,
            scale=self.scale,
            residual=added,
            dropout_p=self.dropout,
            training=self.training,
            backend=self.backend,
        )
        return y if self.norm_after is None else self.norm_after(y)

    def extra_repr(self) -> str:
        """Return what ``print(layer)`` shows."""
        scale: object = self.scale
        if isinstance(scale, Tensor):
            scale = repr("channel" if scale.dim() else "learned")
        text = (
            f"d_model={self.d_model}, bottleneck={self.bottleneck}, "
            f"activation={self.activation!r}, scale={scale}, bias={self.down_bias is not None}"
        )
        if self.dropout:
            text += f", dropout={self.dropout}"
        return text + (", parallel=True" if self.parallel else "")


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f'scale must be a number, "learned" or "channel", got {describe(value)}')
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")
    return float(value)


def _bottleneck(d_model: int, bottleneck: object, reduction_factor: object) -> int:
    if bottleneck is not None:
        return _whole("bottleneck", bottleneck)
    number = isinstance(reduction_factor, (int, float)) and not isinstance(reduction_factor, bool)
    if not number or not 0.0 < reduction_factor < math.inf:  # type: ignore[operator]
        raise ValueError(f"reduction_factor must be a number above 0, got {reduction_factor!r}")
    return max(1, int(d_model // reduction_factor))  # type: ignore[operator]


def _explain(
    layer: Adapter, x: Tensor, residual: Tensor | None = None
) -> tuple[backends.Op, op.AdapterSpec, str | None]:
    return op.explain_call(
        x,
        layer.down_weight,
        layer.up_weight,
        layer.down_bias,
        layer.up_bias,
        activation=layer.activation,
        scale=layer.scale,
        residual="input" if residual is None else residual,
        dropout_p=layer.dropout,
        training=layer.training,
        backend=layer.backend,
    )


backends.explains(Adapter, _explain)
