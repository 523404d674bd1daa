"""Prefix tuning of transformers models: the attention implementation ``peft_kernels_prefix``.

``attach_prefixes`` gives every self-attention layer a trained prefix and makes the model compute
its attention by ``prefix_attention``. Nothing goes through the cache, so gradient checkpointing,
``generate`` with any cache and padding on either side work as they do without a prefix.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_kernels.models.attention.layers import (
    Shift,
    position_modules,
    prefix_of,
    self_attention,
)
from peft_kernels.models.attention.masks import (
    is_whole,
    packed_offsets,
    prefix_mask,
    prepare_tracing,
)
from peft_kernels.prefix.op import prefix_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "peft_kernels_prefix"
# The name under which an attention layer holds its prefix, and so in the model's state dict.
SUBMODULE = "peft_kernels_prefix"
# The argument by which a call brings prefixes of its own (peft's), as ``CallPrefixes``.
CALL_PREFIXES = "peft_kernels_prefixes"
_RECORD = "_peft_kernels_prefixes"

# Of transformers' attention arguments, what has no kernel and would change the result.
_REFUSED = {
    "softcap": "a soft cap on the scores",
    "position_bias": "a bias on the scores (T5)",
    "s_aux": "an attention sink",
    "sinks": "an attention sink",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "cache": "a paged cache (continuous batching)",
    "head_mask": "a mask of heads",
    "output_attentions": "returning attention weights, which are never made whole,",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (attention over the layer's prefix and the sequence [B, S, Hq, d], None).

    A layer without a prefix, such as cross-attention, computes plain attention.

    Args:
        module: the attention layer; its prefix, if it has one, is the submodule
            ``peft_kernels_prefix``, unless the call brings it.
        query: [B, Hq, S, d].
        key: [B, Hkv, T, d], from the cache if there is one.
        value: [B, Hkv, T, d].
        attention_mask: as ``prefix_mask`` makes it.
        dropout: drop probability of the attention weights in this call.
        scaling: of the scores; None takes 1 / sqrt(d).
        sliding_window: keys this many positions back are not seen; the prefix always is.
        is_causal: None takes the layer's own, and so does a call with a mask.
        **kwargs: ``cu_seq_lens_q`` or ``position_ids`` (packed sequences), and
            ``peft_kernels_prefixes``, of which each layer takes its own; what has no kernel is
            refused by name.

    Raises:
        ValueError: a 4-D mask, or an argument that has no kernel; as ``prefix_attention`` raises.
    """
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: {meaning} has no kernel in {IMPLEMENTATION}")
    causal = _is_causal(module) or bool(is_causal)
    if is_causal is False and attention_mask is None:
        # Beside a mask it only says that SDPA is to take the mask instead (GPT-2, transformers 4).
        causal = False
    key_mask, offsets = _mask(attention_mask, kwargs.get("cu_seq_lens_q"))
    tokens, brought, gate = getattr(module, SUBMODULE, None), kwargs.get(CALL_PREFIXES), None
    # Peft's models, and what has no prefix, do as the model does without this implementation.
    own = tokens is not None and brought is None and attention_mask is None and offsets is None
    if own and causal and query.shape[2] == key.shape[2]:
        offsets = _packed(query, kwargs.get("position_ids"))
    if key_mask is not None and key_mask.shape[1] < key.shape[2]:
        # A static cache hands out what was not written yet too.
        key, value = key[:, :, : key_mask.shape[1]], value[:, :, : key_mask.shape[1]]
    if brought is not None:
        prefix_key, prefix_value = brought.of(module, key.device)
    elif tokens is None:
        prefix_key = prefix_value = key.new_empty(key.shape[1], 0, key.shape[3])
    else:
        (prefix_key, prefix_value), gate = tokens.virtual_tokens(), tokens.gate
    batch, _, queries, _ = query.shape
    if offsets is not None and batch > 1:
        query, key, value = (_in_one_row(each) for each in (query, key, value))
    out = prefix_attention(
        query, key, value, prefix_key, prefix_value,
        causal=causal, scale=_scale(module, scaling, key), key_mask=key_mask, cu_seqlens=offsets,
        window=sliding_window, gate=gate, dropout_p=dropout,
    )  # fmt: skip
    return out.transpose(1, 2).reshape(batch, queries, -1, out.shape[3]), None


def _mask(mask: Tensor | None, offsets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask of keys and the offsets of packed sequences that a call was given."""
    if mask is None:
        return None, offsets
    if mask.dim() == 1 and mask.dtype == torch.int32:
        return None, mask if offsets is None else offsets
    if is_whole(mask):
        return None, offsets
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be the 2-D mask of padding [B, positions] for {IMPLEMENTATION}, "
            f"got {list(mask.shape)}: a mask of one's own for every query has no kernel"
        )
    return mask.bool(), offsets


def _packed(query: Tensor, position_ids: Tensor | None) -> Tensor | None:
    """Return the offsets of packed sequences of a call that was given no mask.

    transformers looks for them where it makes masks, but only without a cache, which a model that
    is called in training makes too unless it is told use_cache=False.
    """
    if position_ids is None:
        return None
    batch, _, queries, _ = query.shape
    if position_ids.shape not in ((1, queries), (batch, queries)):
        return None
    offsets = packed_offsets(position_ids)
    if offsets is None or position_ids.shape[0] == batch:
        return offsets
    return packed_offsets(position_ids.expand(batch, -1))


def _scale(module: Any, scaling: float | None, key: Tensor) -> float | None:
    """Return the softmax's scale: transformers 4's GPT-2 keeps its own to itself."""
    if scaling is not None or not hasattr(module, "scale_attn_weights"):
        return scaling
    scale: float = key.shape[3] ** -0.5 if module.scale_attn_weights else 1.0
    return scale / (module.layer_idx + 1) if module.scale_attn_by_inverse_layer_idx else scale


def _is_causal(module: nn.Module) -> bool:
    """Return whether a layer is causal: a decoder whose config says otherwise is not."""
    own = bool(getattr(module, "is_causal", False))
    return own and bool(getattr(getattr(module, "config", None), "is_causal", True))


def _in_one_row(x: Tensor) -> Tensor:
    """Return [B, H, S, d] as [1, H, B · S, d], the layout of packed sequences."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def register() -> None:
    """Make ``peft_kernels_prefix`` known to transformers; ``attach_prefixes`` does.

    transformers is imported only now: it brings Triton along.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, prefix_mask)
    prepare_tracing()


# A pickled model brings its hooks back, and with them this module.
if "transformers" in sys.modules:
    register()


def attach_prefixes(
    model: nn.Module,
    *,
    num_virtual_tokens: int,
    gated: bool = False,
    prefix_projection: bool = False,
    projection_hidden: int | None = None,
    shift_positions: bool = False,
    targets: str | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Give the self-attention layers of a transformers model a trained prefix each, in place.

    The prefix of a layer is its submodule ``peft_kernels_prefix``, a ``VirtualTokens``, so that its
    parameters are the model's; the model's own are left as they are: freeze them first. Its
    attention implementation becomes ``peft_kernels_prefix``. One that is changed afterwards would
    ignore the prefixes: calling the model raises then.

    Args:
        model: a transformers model, or a module around one (peft's).
        num_virtual_tokens: P.
        gated: the prefix has a softmax of its own, times tanh of a gate per head that starts at 0
            (LLaMA-Adapter): training starts at the model as it was.
        prefix_projection: train each layer's prefix through an MLP of its own on [P, Hq d], which
            runs once a call; ``fold`` each ``VirtualTokens`` after training.
        projection_hidden: the MLP's hidden size; None takes Hq d.
        shift_positions: whether tokens are at positions P, P + 1, ..., as peft has it, where a
            prefix trained by peft expects them; otherwise at 0, 1, ..., as without a prefix
            (``adapters``). Prefix keys have no position themselves.
        targets: names or suffixes of the attention layers that get one; None: every
            self-attention. Cross-attention is left alone.
        dtype: of the parameters; None takes each layer's own. float32 beside a bfloat16 model is
            peft's default.

    Returns:
        The full names of the layers, in the order of the model.

    Raises:
        TypeError: there is no transformers model in ``model``.
        ValueError: prefixes are attached already, no attention layer was found or a target matched
            none, a layer does not say whether it is causal or what its window is, chooses keys by
            an indexer, or has values of another head size than keys, the model cannot change its
            attention, or ``shift_positions`` finds no positions.

    Attach after ``from_pretrained``, which would not know the prefixes, and load a saved state dict
    then; attach after peft's ``get_peft_model``, which freezes what it finds. A packed batch is for
    training: its cache does not remember where sequences begin.

    Source: Li and Liang, *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, ACL 2021.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_kernels import attach_prefixes
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config).requires_grad_(False)
        >>> attach_prefixes(model, num_virtual_tokens=5)
        ['model.layers.0.self_attn', 'model.layers.1.self_attn']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        320
    """
    inner = _transformers_model(model)
    if any(hasattr(module, SUBMODULE) for module in model.modules()):
        raise ValueError("model has prefixes already; detach_prefixes(model) first")
    layers = self_attention(model, targets)
    positions = position_modules(model, layers) if shift_positions else []
    built = [
        prefix_of(layer, num_virtual_tokens, gated, prefix_projection, projection_hidden, dtype)
        for layer in layers.values()
    ]
    previous = switch_attention(inner, layers)
    handles: list[RemovableHandle] = []
    for layer, tokens in zip(layers.values(), built, strict=True):
        layer.add_module(SUBMODULE, tokens.train(layer.training))
        handles.append(layer.register_forward_pre_hook(_check_implementation))
    for module in positions:
        shift = Shift(num_virtual_tokens)
        handles.append(module.register_forward_pre_hook(shift, with_kwargs=True))
    inner.__dict__[_RECORD] = list(layers), previous, handles
    return list(layers)


def detach_prefixes(model: nn.Module) -> None:
    """Undo ``attach_prefixes``: the prefixes are gone, the attention is what it was.

    Args:
        model: what ``attach_prefixes`` was given, or a module around it.

    Raises:
        TypeError: there is no transformers model in ``model``.
        ValueError: no prefixes are attached.
    """
    inner = _transformers_model(model)
    if _RECORD not in inner.__dict__:
        raise ValueError("model has no prefixes: attach_prefixes was not called on it")
    names, previous, handles = inner.__dict__.pop(_RECORD)
    for handle in handles:
        handle.remove()
    for name in names:
        delattr(model.get_submodule(name), SUBMODULE)
    inner.set_attn_implementation(previous)


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model must be, or hold, a transformers model, got {type(model).__name__}")


def switch_attention(inner: PreTrainedModel, layers: dict[str, nn.Module]) -> Any:
    """Make the model compute attention by ``attention_forward``; return what it did before."""
    register()
    previous = inner.config._attn_implementation
    inner.set_attn_implementation(IMPLEMENTATION)
    for name, layer in layers.items():
        config: Any = layer.config
        if config._attn_implementation != IMPLEMENTATION:
            inner.set_attn_implementation(previous)
            raise ValueError(
                f"{type(inner).__name__} cannot change the attention of {name!r}: it stays "
                f"{config._attn_implementation!r}"
            )
    return previous


def _check_implementation(layer: nn.Module, _: tuple[Any, ...]) -> None:
    """Raise where a layer with a prefix would not see it."""
    config: Any = layer.config
    if config._attn_implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"the model's attention implementation was changed to {config._attn_implementation!r}, "
            f"which ignores the prefixes: model.set_attn_implementation({IMPLEMENTATION!r}), or "
            f"detach_prefixes(model)"
        )
