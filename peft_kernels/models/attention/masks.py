"""The mask function of ``peft_kernels_prefix``: what transformers' masks mean to the kernels.

transformers describes a mask by a function of indices and asks the attention implementation for its
own form of it. This form holds only what the kernels cannot know by themselves: which keys are
padding, or where packed sequences begin. That a layer is causal or has a window reaches the
attention function with each call; a pattern beyond these is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Functions of transformers.masking_utils whose pattern the attention function is told, or whose
# meaning is read below; the ones that combine others are looked into.
_KNOWN = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
}
# Those that capture nothing: their names tell all, also to torch.compile, which sees no closures.
_PLAIN = ("causal_mask_function", "bidirectional_mask_function")
_COMBINING = {"and_masks": "mask_functions", "remap_positions_for_packed_sequence": "mask_function"}


def prefix_mask(
    batch_size: int,
    q_length: int | Tensor | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what the attention function needs beside causal and window.

    Args:
        batch_size: B.
        q_length: S.
        kv_length: T, of the keys that the cache hands out; a static cache has more than were seen.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: transformers' pattern, a function of (batch, head, query, key).
        attention_mask: bool [B, positions seen], True = keep, or None.
        **kwargs: ``cache_position``, transformers 4's word for q_length and q_offset; else unread.

    Returns:
        None: every key is there, and no mask was given; bool [B, 0, 1]: every key is there by a
        mask that was given (``is_whole``); bool [B, T'], True = keep, where some are not (keys from
        T' on have not been written yet); or int32 [n + 1], the offsets of n packed sequences in
        B · S tokens.

    Raises:
        ValueError: a pattern that has no kernel, or a mask that ends before the last query.
    """
    cache_position = kwargs.get("cache_position")
    if cache_position is None and isinstance(q_length, Tensor):
        cache_position = q_length
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    # Packed sequences, found where no mask is given, and chunks hold tensors in their patterns.
    chunked = getattr(kwargs.get("config"), "attention_chunk_size", None)
    traced = torch.compiler.is_compiling() and attention_mask is not None and not chunked
    parts = dict((_traced_parts if traced else _parts)(mask_function))
    if "packed_sequence_mask_function" in parts:
        return _offsets(parts["packed_sequence_mask_function"]["packed_sequence_mask"])
    width = kv_length
    if "causal_mask_function" in parts and kv_length != q_length:
        # A static cache hands out keys that have not been written yet.
        width = min(width, int(q_offset) + int(q_length or 0) - kv_offset)
    # What this function gave may be given to it: generate makes masks ahead.
    if attention_mask is None or is_whole(attention_mask):
        if width == kv_length:
            return attention_mask
        device = kwargs.get("device")
        return torch.ones(batch_size, width, dtype=torch.bool, device=device)
    if isinstance(q_offset, int) and attention_mask.shape[1] > q_offset + int(q_length or 0):
        if "causal_mask_function" in parts:
            raise ValueError(
                f"attention_mask must end with the last query: {q_offset + int(q_length or 0)} "
                f"columns, got {list(attention_mask.shape)}"
            )
    keep = attention_mask[:, kv_offset : kv_offset + width].bool()
    if keep.shape[1] != width:
        raise ValueError(
            f"attention_mask must reach the last query: {kv_offset + width} columns for the keys "
            f"seen so far and the new ones, got {list(attention_mask.shape)}"
        )
    # Looking stops the host for a moment, once a model call; a traced mask cannot be looked at.
    whole = width == kv_length and not torch.compiler.is_compiling()
    return keep[:, :0, None] if whole and bool(keep.all()) else keep


def is_whole(mask: Tensor) -> bool:
    """Return whether ``prefix_mask`` made this of a mask that hides nothing; no user's is so."""
    return mask.dim() == 3 and mask.shape[1:] == (0, 1)


def packed_offsets(position_ids: Tensor) -> Tensor | None:
    """Return the offsets of the sequences that positions [B, S] count, or None: one in each row.

    What is found is kept with the tensor: the layers of a model look at the same one.
    """
    found: Tensor | None
    steps = position_ids.diff(dim=-1) != 1
    if torch.compiler.is_compiling() or position_ids.is_inference():
        # Traced, it cannot be looked at: a row of one sequence is packed too.
        whole = not torch.compiler.is_compiling() and not steps.any()
        return None if whole else _offsets(nn.functional.pad(steps.cumsum(-1), (1, 0)))
    version, found = getattr(position_ids, "_peft_kernels_offsets", (None, None))
    if version != position_ids._version:
        found = _offsets(nn.functional.pad(steps.cumsum(-1), (1, 0))) if steps.any() else None
        position_ids._peft_kernels_offsets = (  # type: ignore[attr-defined]
            position_ids._version, found,
        )  # fmt: skip
    return found


def _parts(mask_function: Callable[..., Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of every pattern that a mask function combines, and what it captured.

    Raises:
        ValueError: one of them has no kernel.
    """
    if mask_function is None:
        return
    if getattr(mask_function, "__name__", None) in _PLAIN:
        yield mask_function.__name__, {}
        return
    name = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
    captured = (
        dict(inspect.getclosurevars(mask_function).nonlocals)
        if inspect.isfunction(mask_function)
        else {}
    )
    if name in _COMBINING:
        inner = captured[_COMBINING[name]]
        for each in inner if isinstance(inner, (tuple, list)) else (inner,):
            yield from _parts(each)
    elif name in _KNOWN:
        yield name, captured
    else:
        kind = "chunked attention" if name.startswith("chunked") else f"the mask pattern {name!r}"
        raise ValueError(
            f"{kind} has no kernel in peft_kernels_prefix, which knows causal and bidirectional "
            f"attention, sliding windows, padding and packed sequences"
        )


def _traced_parts(mask_function: Callable[..., Any] | None) -> tuple[tuple[str, Any], ...]:
    """Return the names of ``_parts``, of a pattern that holds no tensors.

    What a traced function captures cannot be seen: this runs while tracing, on the function itself.
    """
    return tuple((name, None) for name, _ in _parts(mask_function))


def prepare_tracing() -> None:
    """Have ``prefix_mask`` traced as it must be: not at import, Dynamo brings Triton along."""
    torch.compiler.assume_constant_result(_traced_parts)


def _offsets(packed: Tensor) -> Tensor:
    """Return where sequences begin, and the last ends, in the tokens of all rows, int32 [n + 1].

    Args:
        packed: [B, S], the number of the sequence that each token is in.
    """
    starts = torch.ones_like(packed, dtype=torch.bool)
    starts[:, 1:] = packed[:, 1:] != packed[:, :-1]
    starts = starts.flatten()
    tokens = starts.numel()
    if torch.compiler.is_compiling():
        # A shape that depends on no data: empty sequences at the end.
        index = torch.arange(tokens, device=packed.device)
        begin = torch.where(starts, index, tokens).sort().values
    else:
        begin = starts.nonzero().flatten()
    return nn.functional.pad(begin, (0, 1), value=tokens).int()
