"""What ``nn.MultiheadAttention`` means by its arguments, in the words of ``prefix_attention``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels.core.checks import describe


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
