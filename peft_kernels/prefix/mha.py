"""What ``nn.MultiheadAttention`` means by its arguments, in the words of ``prefix_attention``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels.core.checks import autocast_enabled, describe


def check_mha(mha: object) -> nn.MultiheadAttention:
    """Return ``mha`` where ``PrefixAttention`` computes the same.

    Raises:
        TypeError: not exactly an ``nn.MultiheadAttention``.
        ValueError: sequence-first, or with ``add_bias_kv`` or ``add_zero_attn``.
    """
    if type(mha) is not nn.MultiheadAttention:
        kind = type(mha)
        raise TypeError(
            f"from_mha takes a torch.nn.MultiheadAttention, got {kind.__module__}."
            f"{kind.__name__}, whose forward may differ; wrap its nn.MultiheadAttention instead"
        )
    if not mha.batch_first:
        raise ValueError(
            "mha has batch_first=False: this layer takes [B, S, E]. Set mha.batch_first = True and "
            "transpose its inputs, or make it so"
        )
    if mha.bias_k is not None or mha.bias_v is not None:
        raise ValueError(
            "mha has add_bias_kv=True, a learned key and value behind the sequence, which the "
            "fused kernels do not know; make it without, and let a virtual token learn that"
        )
    if mha.add_zero_attn:
        raise ValueError("mha has add_zero_attn=True, which the fused kernels do not know")
    return mha


def batched(
    query: object, key: object, value: object, key_padding_mask: object
) -> tuple[Tensor, Tensor, Tensor, object, bool]:
    """Return the inputs of a call as [B, S, E], the mask beside them, and whether B was left out.

    What is one tensor stays one: key left out is query, value left out is key.

    Raises:
        TypeError: not a tensor, or a nested one.
        ValueError: another number of dimensions.
    """
    key = query if key is None else key
    value = key if value is None else value
    named = {"query": query, "key": key, "value": value}
    tensors = [_dense(name, each) for name, each in named.items()]
    query, key, value = tensors
    for name, tensor in zip(named, tensors, strict=True):
        if tensor.dim() not in (2, 3) or tensor.dim() != query.dim():
            raise ValueError(
                f"{name} must have shape [B, S, E], or all three [S, E], got {list(tensor.shape)} "
                f"beside query {list(query.shape)}"
            )
    if query.dim() == 3:
        return query, key, value, key_padding_mask, False
    if isinstance(key_padding_mask, Tensor) and key_padding_mask.dim() == 1:
        key_padding_mask = key_padding_mask[None]
    of_one = {id(each): each[None] for each in tensors}
    query, key, value = (of_one[id(each)] for each in tensors)
    return query, key, value, key_padding_mask, True


def _dense(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, which nn.TransformerEncoder makes of padding in "
            f"evaluation: set use_nested_tensor = False on it, or put the layer there with "
            f"peft_kernels.replace, which does"
        )
    return value


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, widths: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Check batched inputs against each other and against the projections.

    Raises:
        TypeError: another dtype than that of the projections, without autocast.
        ValueError: other widths, or a value for other keys.
    """
    named = {"query": query, "key": key, "value": value}
    for (name, tensor), width in zip(named.items(), widths, strict=True):
        if tensor.shape[2] != width:
            raise ValueError(
                f"{name} must be {width} wide, as the layer's projection is, got "
                f"{list(tensor.shape)}"
            )
        if tensor.dtype != dtype and not autocast_enabled(tensor.device):
            raise TypeError(
                f"{name} is {tensor.dtype} and the layer is {dtype}: cast one of them, or run "
                f"under torch.autocast({tensor.device.type!r})"
            )
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have query's batch of {query.shape[0]}, got {list(key.shape)}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"value must have a row for each key, {list(key.shape[:2])}, got {list(value.shape)}"
        )


def key_mask(key_padding_mask: object, batch: int, keys: int) -> Tensor | None:
    """Return ``prefix_attention``'s key_mask, True = keep, for a mask whose True means ignore.

    Args:
        key_padding_mask: bool [B, T], True = ignore, or float with -inf = ignore and 0 = keep (what
            ``nn.TransformerEncoderLayer`` passes on), or None. The values of a float mask are
            checked on a CPU alone: on a GPU whatever is not 0 is ignored.
        batch: B.
        keys: T.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or a float mask that adds something finite.
    """
    if key_padding_mask is None:
        return None
    mask = key_padding_mask
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"key_padding_mask must be a bool tensor, True = ignore, or a float one of 0 and -inf, "
            f"got {describe(mask)}"
        )
    if list(mask.shape) != [batch, keys]:
        raise ValueError(
            f"key_padding_mask must have shape {[batch, keys]}, one entry for each key (the prefix "
            f"has none: it is always seen), got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return ~mask
    keep = mask == 0
    looked_at = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not (keep | mask.isneginf()).all():
        raise ValueError(
            "key_padding_mask must hold 0 (keep) and -inf (ignore) where it is a float tensor; a "
            "bias on the scores has no kernel"
        )
    return keep


def check_masks(attn_mask: object, is_causal: bool, causal: bool, queries: int, keys: int) -> None:
    """Check ``attn_mask`` beside ``is_causal``, which says that it is the causal mask.

    Raises:
        ValueError: a mask of its own, or is_causal where there are more keys than queries.
    """
    if attn_mask is not None and not is_causal:
        raise ValueError(
            f"attn_mask has no kernel unless it is the causal one, got {describe(attn_mask)}: pass "
            f"is_causal=True with it or in its place, or make the layer with causal=True; "
            f"key_padding_mask hides keys for all queries"
        )
    if is_causal and not causal and queries != keys:
        raise ValueError(
            f"is_causal of nn.MultiheadAttention counts from the first key, this layer from the "
            f"last: they differ for {queries} queries and {keys} keys. Make the layer with "
            f"causal=True for query i to see the keys up to i + T - S (decoding)"
        )


def check_weights_unneeded(need_weights: object) -> None:
    """Raise ValueError where attention weights are asked for."""
    if need_weights:
        raise ValueError(
            "need_weights=True: the attention weights are never made whole; pass "
            "need_weights=False (the default here), and None is returned in their place"
        )
