"""``PrefixAttention``: ``nn.MultiheadAttention`` with a trained prefix before keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels.core import backend as backends
from peft_kernels.core.checks import check_probability
from peft_kernels.prefix import mha as meanings
from peft_kernels.prefix import op
from peft_kernels.prefix.virtual_tokens import VirtualTokens, check_count


class PrefixAttention(VirtualTokens):
    """Multi-head attention over ``[prefix ; sequence]``, a drop-in for ``nn.MultiheadAttention``.

    The projections are frozen and named as ``nn.MultiheadAttention`` (with ``batch_first=True``)
    names them, so that its state dict fits; the prefix is trained. Unlike there, ``key`` and
    ``value`` may be left out (self-attention), and the attention weights are never made: None is
    returned in their place.

    Keys of the state dict beside the projections: ``prefix_key`` and ``prefix_value``, and ``gate``
    where gated; with ``prefix_projection`` ``prefix`` and ``projection.0``, ``.2`` (``.weight``,
    ``.bias``) in place of the first two, until ``fold`` turns them into those.

    Args:
        embed_dim: E, the width of the inputs and of the result.
        num_heads: Hq; E is a multiple of it.
        num_virtual_tokens: P; 0 is the base layer alone.
        num_kv_heads: Hkv, a divisor of Hq (grouped-query attention); None takes Hq.
        causal: query i sees the keys up to i + T - S, whatever ``forward`` is told.
        gated: the prefix has a softmax of its own, times tanh of a gate for each head, which starts
            at 0: training starts at the base layer exactly (LLaMA-Adapter).
        prefix_projection: train the prefix through an MLP (Linear, Tanh, Linear), which runs once a
            call on [P, E], not once a row; ``fold`` it away after training.
        projection_hidden: the MLP's hidden size; None takes E.
        bias: whether the projections have biases.
        dropout: drop probability of the attention weights, in [0, 1).
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Attributes:
        in_proj_weight: frozen, [E + 2 Hkv d, E] with d = E / Hq; None where ``from_mha`` met key
            and value of widths of their own (``kdim``, ``vdim``): ``q_proj_weight``,
            ``k_proj_weight`` and ``v_proj_weight`` then.
        in_proj_bias: frozen, [E + 2 Hkv d], or None.
        out_proj: the frozen ``nn.Linear`` behind the heads.
        prefix_key: [Hkv, P, d], or None where there is a projection.
        prefix_value: likewise.
        prefix: [P, E], the rows that the MLP is given, or None.
        projection: the MLP, or None.
        gate: [Hq], or None.
        causal: may be changed between calls.
        backend: None, or the name of a backend to demand.

    Raises:
        ValueError: sizes that do not divide or are below 1 (``num_virtual_tokens``: 0), dropout
            outside [0, 1).

    Source: Li and Liang, *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, ACL 2021;
    the gated form: Zhang et al., *LLaMA-Adapter*, ICLR 2024.

    Example:
        >>> import torch
        >>> from peft_kernels import PrefixAttention
        >>> mha = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        >>> layer = PrefixAttention.from_mha(mha, num_virtual_tokens=5)
        >>> x = torch.randn(2, 7, 32)
        >>> out, _ = layer(x, x, x, is_causal=True)
        >>> out.shape
        torch.Size([2, 7, 32])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['prefix_key', 'prefix_value']
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter

    # What nn.MultiheadAttention has and its users read. nn.TransformerEncoderLayer computes the
    # attention by itself in evaluation, without calling this layer, unless the second is False.
    batch_first = True
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_virtual_tokens: int,
        num_kv_heads: int | None = None,
        causal: bool = False,
        gated: bool = False,
        prefix_projection: bool = False,
        projection_hidden: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer with a freshly initialised base."""
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(embed_dim, num_heads, kv_heads)
        nn.Module.__init__(self)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = embed_dim + 2 * kv_heads * (embed_dim // num_heads)
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim, **options))
        nn.init.xavier_uniform_(self.in_proj_weight)
        in_proj_bias = nn.Parameter(torch.zeros(rows, **options)) if bias else None
        self.register_parameter("in_proj_bias", in_proj_bias)
        out_proj = nn.Linear(embed_dim, embed_dim, bias, **options)
        if bias:
            nn.init.zeros_(out_proj.bias)
        self._init(
            out_proj, num_heads, kv_heads, num_virtual_tokens, causal, gated, prefix_projection,
            projection_hidden, dropout, dtype,
        )  # fmt: skip

    @classmethod
    def from_mha(
        cls,
        mha: nn.MultiheadAttention,
        *,
        num_virtual_tokens: int,
        causal: bool = False,
        gated: bool = False,
        prefix_projection: bool = False,
        projection_hidden: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> PrefixAttention:
        """Wrap ``mha``, sharing its projections, freezing them, and taking its dropout.

        Args:
            mha: the base layer, ``batch_first``; its parameters become this layer's, not copies.
            num_virtual_tokens: P, as in the constructor, and so are the others.
            causal: whether keys after the query are hidden.
            gated: whether the prefix has a softmax of its own and a gate.
            prefix_projection: whether an MLP stands behind the prefix.
            projection_hidden: the MLP's hidden size.
            dtype: dtype of what is trained; None takes the projections'. float32 beside bfloat16
                projections is peft's default.

        Raises:
            TypeError: not exactly an ``nn.MultiheadAttention``.
            ValueError: it is sequence-first, or has ``add_bias_kv`` or ``add_zero_attn``; or as the
                constructor raises.
        """
        meanings.check_mha(mha)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if name == "in_proj_weight" or getattr(mha, name) is not None:
                layer.register_parameter(name, getattr(mha, name))
        layer.register_parameter("in_proj_bias", mha.in_proj_bias)
        layer._init(
            mha.out_proj, mha.num_heads, mha.num_heads, num_virtual_tokens, causal, gated,
            prefix_projection, projection_hidden, mha.dropout, dtype,
        )  # fmt: skip
        return layer.train(mha.training)

    def _init(
        self,
        out_proj: nn.Linear,
        heads: int,
        kv_heads: int,
        tokens: int,
        causal: bool,
        gated: bool,
        prefix_projection: bool,
        projection_hidden: int | None,
        dropout: float,
        dtype: torch.dtype | None,
    ) -> None:
        self.embed_dim, self.causal = out_proj.in_features, causal
        self.dropout = check_probability("dropout", dropout)
        self.backend: str | None = None
        weight = out_proj.weight
        self._make_virtual_tokens(
            self.embed_dim, heads, kv_heads, self.embed_dim // heads, tokens, gated,
            prefix_projection, projection_hidden, weight.device, dtype or weight.dtype,
        )  # fmt: skip
        # Last: a layer that was refused stays as it was.
        for frozen in (*self._projections(), self.in_proj_bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.out_proj = out_proj.requires_grad_(False)
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Return (the attended sequence [B, S, E], None).

        Args:
            query: [B, S, E], or [S, E] for a single one.
            key: [B, T, E] (or its ``kdim``); None takes query.
            value: [B, T, E] (or its ``vdim``); None takes key.
            key_padding_mask: [B, T], True = ignore; or float, -inf = ignore and 0 = keep. Not about
                the prefix, which is always seen.
            need_weights: must not be True (``nn.MultiheadAttention``'s default is).
            attn_mask: None, or the causal mask together with ``is_causal``; not read.
            average_attn_weights: means nothing without weights.
            is_causal: query i sees the keys up to i; with as many queries as keys.

        Raises:
            ValueError: weights are asked for, a mask of its own, shapes that disagree.
            TypeError: inputs of another dtype than the layer's, a padding mask of another dtype.
        """
        query, key, value, mask, single = meanings.batched(query, key, value, key_padding_mask)
        options = self._options(query, key, value, mask, need_weights, attn_mask, is_causal)
        q, k, v = self._projected(query, key, value)
        prefix_key, prefix_value = self.virtual_tokens()
        out = op.prefix_attention(q, k, v, prefix_key, prefix_value, gate=self.gate, **options)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out[0] if single else out), None

    def _options(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: object,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> dict[str, Any]:
        """Return the options of ``prefix_attention`` that a call means, checked."""
        meanings.check_inputs(query, key, value, self._widths(), self._projections()[0].dtype)
        meanings.check_weights_unneeded(need_weights)
        meanings.check_masks(attn_mask, is_causal, self.causal, query.shape[1], key.shape[1])
        return {
            "causal": self.causal or is_causal,
            "key_mask": meanings.key_mask(key_padding_mask, *key.shape[:2]),
            "dropout_p": self.dropout,
            "training": self.training,
            "backend": self.backend,
        }

    def _projections(self) -> tuple[Tensor, ...]:
        """Return the weight of all three projections, or one for each."""
        if self.in_proj_weight is not None:
            return (self.in_proj_weight,)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _widths(self) -> tuple[int, int, int]:
        """Return how wide query, key and value are."""
        weights = self._projections()
        query, key, value = weights * 3 if len(weights) == 1 else weights
        return query.shape[1], key.shape[1], value.shape[1]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return query [B, Hq, S, d], key and value [B, Hkv, T, d], in one product if they can."""
        kv_size = self.num_kv_heads * self.head_dim
        sizes = [self.embed_dim, kv_size, kv_size]
        weights, bias = self._projections(), self.in_proj_bias
        if len(weights) == 1 and query is key and key is value:
            parts = F.linear(query, weights[0], bias).split(sizes, -1)
        else:
            split = weights[0].split(sizes) if len(weights) == 1 else weights
            biases = (None, None, None) if bias is None else bias.split(sizes)
            inputs = zip((query, key, value), split, biases, strict=True)
            parts = tuple(F.linear(x, weight, b) for x, weight, b in inputs)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)

    def extra_repr(self) -> str:
        """Return what ``print(layer)`` shows."""
        text = f"embed_dim={self.embed_dim}, {super().extra_repr()}"
        for name in ("causal", "dropout"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text


def _check_heads(embed_dim: int, heads: int, kv_heads: int) -> None:
    for name, value in (
        ("embed_dim", embed_dim), ("num_heads", heads), ("num_kv_heads", kv_heads),
    ):  # fmt: skip
        check_count(name, value, least=1)
    if embed_dim % heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {heads}")
    if heads % kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}"
        )


def _explain(
    layer: PrefixAttention, *args: Any, **kwargs: Any
) -> tuple[backends.Op, op.PrefixSpec, str | None]:
    """Return what decides the backend of a call: shapes alone, nothing is projected."""

    def call(
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[backends.Op, op.PrefixSpec, str | None]:
        query, key, value, mask, _ = meanings.batched(query, key, value, key_padding_mask)
        options = layer._options(query, key, value, mask, need_weights, attn_mask, is_causal)

        def heads(x: Tensor, count: int) -> Tensor:
            return x.new_empty(()).expand(x.shape[0], count, x.shape[1], layer.head_dim)

        keys, prefix = heads(key, layer.num_kv_heads), layer.out_proj.weight.new_empty(())
        prefix = prefix.expand(layer.num_kv_heads, layer.num_virtual_tokens, layer.head_dim)
        return op.explain_call(
            heads(query, layer.num_heads), keys, keys, prefix, prefix, gate=layer.gate, **options
        )

    return call(*args, **kwargs)


backends.explains(PrefixAttention, _explain)
