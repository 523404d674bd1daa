"""Argument checks of prefix attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.core import backend as backends
from peft_kernels.core import checks

# Wider ones hide nothing either, and would not fit 64 bits: a tokenizer's "no limit" is 1e30.
_WIDEST_WINDOW = 2**62


class Options(NamedTuple):
    """What ``check_options`` made of the numbers of a call."""

    causal: bool
    scale: float | None
    window: int | None
    dropout_p: float


def check_shapes(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
) -> None:
    """Check the five tensors against each other; their types have been checked."""
    for name, tensor, layout in (
        ("query", query, "[B, Hq, S, d]"),
        ("key", key, "[B, Hkv, T, d]"),
        ("value", value, "[B, Hkv, T, d]"),
    ):
        checks.check_ndim(name, tensor, 4, layout)
    batch, heads, _, size = query.shape
    kv_heads = key.shape[1]
    if size == 0:
        raise ValueError(f"query must have a head size of at least 1, got {list(query.shape)}")
    if key.shape[0] != batch or key.shape[3] != size:
        raise ValueError(
            f"key must have shape [{batch}, Hkv, T, {size}] to fit query {list(query.shape)}, got "
            f"{list(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {list(key.shape)}, got {list(value.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query's heads must be a multiple of key's, got {heads} (query {list(query.shape)}) "
            f"and {kv_heads} (key {list(key.shape)})"
        )
    _check_prefix("prefix_key", prefix_key, key)
    _check_prefix("prefix_value", prefix_value, key)
    if prefix_value.shape != prefix_key.shape:
        raise ValueError(
            f"prefix_value must have the shape of prefix_key, {list(prefix_key.shape)}, got "
            f"{list(prefix_value.shape)}"
        )


def _check_prefix(name: str, prefix: Tensor, key: Tensor) -> None:
    batch, kv_heads, _, size = key.shape
    fits = prefix.dim() in (3, 4) and prefix.shape[-3] == kv_heads and prefix.shape[-1] == size
    if not fits or (prefix.dim() == 4 and prefix.shape[0] != batch):
        raise ValueError(
            f"{name} must have shape [{kv_heads}, P, {size}], one for all batch rows, or "
            f"[{batch}, {kv_heads}, P, {size}] to fit key {list(key.shape)}, got "
            f"{list(prefix.shape)}"
        )


def check_options(
    causal: object, scale: object, window: object, dropout_p: object, query: Tensor, key: Tensor
) -> Options:
    """Check the numbers of a call."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {checks.describe(causal)}")
    queries, keys = query.shape[2], key.shape[2]
    if causal and queries > keys:
        raise ValueError(
            f"causal needs at most as many queries as keys (query i stands at key i + T - S), got "
            f"S = {queries} and T = {keys}; give all keys of the queries, or causal=False"
        )
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(
                f"scale must be a number or None (1 / sqrt(d)), got {checks.describe(scale)}"
            )
        if not torch.compiler.is_compiling() and not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        scale = float(scale)
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window must be an integer or None, got {checks.describe(window)}")
        if window < 1:
            raise ValueError(
                f"window must be at least 1 (the key at the query's own position), got {window}; "
                f"None hides no key"
            )
        window = min(window, _WIDEST_WINDOW)
    probability = checks.check_probability("dropout_p", dropout_p)
    return Options(causal, scale, window, probability)


def check_key_mask(mask: object, key: Tensor) -> None:
    """Check that ``mask`` is None or bool [B, T].

    Raises:
        TypeError: not a bool tensor.
        ValueError: another shape or device.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be a bool tensor, True = keep, got {checks.describe(mask)}; write "
            f"mask.bool() for a mask of ones and zeros, mask == 0 for an additive one"
        )
    wanted = [key.shape[0], key.shape[2]]
    if list(mask.shape) != wanted:
        raise ValueError(
            f"key_mask must have shape {wanted}, one entry for each key of the sequence (the "
            f"prefix has none: it is always seen), got {list(mask.shape)}"
        )


def check_cu_seqlens(cu_seqlens: object, query: Tensor, key: Tensor) -> None:
    """Check that ``cu_seqlens`` is None or fits packed tensors; its values, on a CPU alone.

    Raises:
        TypeError: not an int32 tensor.
        ValueError: another shape or device, tensors that are not packed, or offsets that are not.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"cu_seqlens must be an int32 tensor, got {checks.describe(cu_seqlens)}; cast it with "
            f".to(torch.int32)"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have shape [n + 1], where each of n >= 1 packed sequences starts and "
            f"the last one ends, got {list(cu_seqlens.shape)}"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"cu_seqlens needs packed tensors, one batch row with as many queries as keys, got "
            f"query {list(query.shape)} and key {list(key.shape)}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_offsets(cu_seqlens, key.shape[2])


def check_offsets(cu_seqlens: Tensor, keys: int) -> None:
    """Raise ValueError unless a CPU tensor's offsets run from 0 to ``keys`` without a decrease."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != keys:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at {keys}, the number of packed keys, got "
            f"{_shown(offsets)}"
        )
    if any(after < before for before, after in zip(offsets, offsets[1:], strict=False)):
        raise ValueError(f"cu_seqlens must be increasing, got {_shown(offsets)}")


def _shown(offsets: list[int]) -> str:
    return str(offsets if len(offsets) <= 12 else [*offsets[:10], "...", offsets[-1]])


def check_gate(gate: object, heads: int) -> None:
    """Check that ``gate`` is None or a float tensor of one number for each query head.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape.
    """
    if gate is None:
        return
    gate = checks.check_tensor("gate", gate)
    if list(gate.shape) != [heads]:
        raise ValueError(
            f"gate must have shape [{heads}], one number for each query head, got "
            f"{list(gate.shape)}; expand a single one with gate.expand({heads})"
        )


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    gate: Tensor | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[torch.dtype, bool, Options]:
    """Check a call before anything runs.

    Returns:
        The dtype to compute in, whether autocast is on, and the numbers.
    """
    named: dict[str, Tensor | None] = {
        "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value,
    }  # fmt: skip
    missing = key is None or value is None or prefix_key is None or prefix_value is None
    uniform = not missing and checks.uniform(query, key, value, prefix_key, prefix_value)
    if not uniform:
        checks.check_tensor("query", query)
        for name, tensor in named.items():
            checks.check_tensor(name, tensor)
    check_shapes(query, key, value, prefix_key, prefix_value)
    options = check_options(causal, scale, window, dropout_p, query, key)
    check_key_mask(key_mask, key)
    check_cu_seqlens(cu_seqlens, query, key)
    check_gate(gate, query.shape[1])
    backends.check_backend_name(backend)
    beside = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "gate": gate}
    checks.check_same_device(beside, query.device, of="query")
    autocast = checks.autocast_enabled(query.device)
    if uniform and not autocast:
        return query.dtype, False, options
    checks.check_same_device(named, query.device, of="query")
    dtype = checks.compute_dtype(query, named, exact=("key", "value"), of="query")
    return dtype, autocast, options
