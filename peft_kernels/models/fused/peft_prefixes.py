"""peft's prefix tuning on ``prefix_attention``: what a call of the model hands to its layers.

peft keeps the prefixes of all layers in one table [P, 2 · layers · hidden], behind an MLP or not,
and gives them to a model as a cache that is full already. Here a call reads the table once and
brings [Hkv, P, d] views of it as a keyword argument, ``CallPrefixes``, which every layer passes on
to its attention: no copy for each row of the batch, no cache. A checkpointed layer is run again
with the arguments that it had, so with the prefixes of its own call, whatever was called since.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.core.library import once_differentiable
from peft_kernels.models.attention.bridge import CALL_PREFIXES, IMPLEMENTATION, switch_attention
from peft_kernels.models.attention.layers import heads_of, position_modules, self_attention
from peft_kernels.models.fused.peft_prompt_calls import PLAIN_TENSORS

# What a fused model holds beside what peft gave it.
RECORD = "_peft_kernels_prefix_record"


class Record(NamedTuple):
    """Which prefixes a base model takes, and how it computed attention before."""

    attention: str
    layers: int
    kv_heads: int
    head_dim: int


class CallPrefixes:
    """The prefixes of all layers in one call of a model.

    Args:
        table: [P, 2 · layers, Hkv, d], keys and values of layer 0, of layer 1, and so on.

    Attributes:
        served: indices of the layers that took theirs.
    """

    def __init__(self, table: Tensor) -> None:
        self._slices = table.permute(1, 2, 0, 3).unbind(0)  # [Hkv, P, d] each
        self._leaves: dict[int, Tensor] = {}
        self._open = True
        self._unrecorded = self._carried = self._given = False
        self.trained = table.requires_grad and torch.is_grad_enabled()
        self.served: set[int] = set()

    def argument(self) -> dict[str, CallPrefixes]:
        """Return the keyword argument that brings them to the layers."""
        self._given = True
        return {CALL_PREFIXES: self}

    def of(self, module: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, P, d] for an attention layer.

        After the call, in a layer that is run again for its gradients, they are leaves: reentrant
        checkpointing goes backward from each layer on its own, and through an MLP behind the table
        only one can. ``_Carrier`` takes the leaves' gradients on.
        """
        index = module.layer_idx
        self.served.add(index)
        if self._open:
            self._unrecorded |= self.trained and not torch.is_grad_enabled()
            key, value = self._slices[2 * index], self._slices[2 * index + 1]
        else:
            key, value = self._leaf(2 * index), self._leaf(2 * index + 1)
        return key.to(device), value.to(device)

    def _leaf(self, number: int) -> Tensor:
        if number not in self._leaves:
            leaf = self._slices[number].detach().requires_grad_(self.trained)
            self._leaves[number] = leaf
        return self._leaves[number]

    def carry(self, embeddings: Tensor) -> Tensor:
        """Return the model's embeddings, behind which the leaves' gradients are collected."""
        self._carried = True
        return _Carrier.apply(self, embeddings, *self._slices)

    def collected(self) -> list[Tensor | None]:
        """Return the gradients of all leaves, which are then forgotten."""
        leaves, self._leaves = self._leaves, {}
        return [leaves[n].grad if n in leaves else None for n in range(len(self._slices))]

    def close(self, layers: int, may_drop: bool) -> None:
        """End the call.

        Raises:
            RuntimeError: layers did not take their prefixes, or took them where no gradient finds
                its way back.
        """
        self._open = False
        if self._given and len(self.served) != layers and not (may_drop and self.served):
            raise RuntimeError(
                f"{layers - len(self.served)} of {layers} attention layers were not reached by "
                f"their prefix: was the attention implementation changed, or does the model keep "
                f"arguments to itself? peft_kernels.unaccelerate(model) lets peft do it"
            )
        if self._unrecorded and not self._carried:
            raise RuntimeError(
                "layers were run without recording gradients, and the embeddings do not need any: "
                "reentrant checkpointing needs model.enable_input_require_grads() (or use "
                "use_reentrant=False)"
            )


class _Carrier(torch.autograd.Function):
    """The identity, whose backward, the model's last one, hands on the leaves' gradients."""

    @staticmethod
    def forward(ctx: Any, prefixes: CallPrefixes, embeddings: Tensor, *slices: Tensor) -> Tensor:
        ctx.prefixes = prefixes
        return embeddings.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_embeddings: Tensor) -> tuple[Any, ...]:
        return None, d_embeddings, *ctx.prefixes.collected()


def why_not(model: Any) -> str | None:
    """Return why peft's prefixes must stay what they are in this model; None if they need not."""
    base, config = model.base_model, model.active_peft_config
    if config.num_transformer_submodules != 1 or base.config.is_encoder_decoder:
        return "an encoder-decoder takes the prefixes of both by peft's cache"
    if base.config.get_text_config() is not base.config:
        return "a model of several parts takes its prefix by peft's cache"
    if _windowed(base.config):
        return (
            "its attention has a sliding window, which in peft the prefix slides out of: "
            "prefix_attention always sees it"
        )
    if not getattr(base, "_can_set_attn_implementation", lambda: True)():
        return f"{type(base).__name__} cannot change its attention implementation"
    try:
        layers = self_attention(base, None)
        position_modules(base, layers)
        sizes = {heads_of(each)[1:] for each in layers.values()}
    except ValueError as reason:
        return str(reason)
    for name in layers:
        for holder in _holders(base, name):
            if not _passes_any(holder):
                return f"{type(holder).__name__} does not pass arguments on to its attention"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{type(base).__name__} takes no position_ids"
    found = sorted(getattr(each, "layer_idx", -1) for each in layers.values())
    if found != list(range(config.num_layers)):
        return f"its attention layers are {found}, the prefix has {config.num_layers}"
    if sizes != {_sizes(config)}:
        return f"its layers have (heads, size) {sorted(sizes)}, the prefix {_sizes(config)}"
    return None


def acquire(model: Any) -> None:
    """Switch the base model's attention, and remember what it was."""
    previous = switch_attention(model.base_model, self_attention(model.base_model, None))
    config = model.active_peft_config
    model.__dict__[RECORD] = Record(previous, config.num_layers, *_sizes(config))


def release(model: Any) -> None:
    """Give the base model its own attention again."""
    record = model.__dict__.pop(RECORD, None)
    if record is not None:
        model.base_model.set_attn_implementation(record.attention)


def fits(model: Any) -> bool:
    """Return whether the active adapter has a prefix for every layer, of its heads, not sharded."""
    record, config = model.__dict__.get(RECORD), model.active_peft_config
    if record is None or record[1:] != (config.num_layers, *_sizes(config)):
        return False
    return type(model.prompt_encoder[model.active_adapter].embedding.weight) in PLAIN_TENSORS


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Let the base model compute attention as it did before, for as long as this is open."""
    record, base = model.__dict__.get(RECORD), model.base_model
    if record is None or base.config._attn_implementation != IMPLEMENTATION:
        yield
        return
    base.set_attn_implementation(record.attention)
    try:
        yield
    finally:
        base.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def opened(model: Any) -> Iterator[CallPrefixes]:
    """Yield the prefixes for a call of the base model, which takes place meanwhile."""
    prefixes = CallPrefixes(_table(model))
    base = model.base_model
    hook = None
    if prefixes.trained and not torch.compiler.is_compiling():

        def carry(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            wanted = output.requires_grad or _is_reentrant(base)
            return prefixes.carry(output) if wanted else output

        hook = base.get_input_embeddings().register_forward_hook(carry)
    try:
        yield prefixes
    finally:
        if hook is not None:
            hook.remove()
    prefixes.close(model.__dict__[RECORD].layers, base.training and _drops_layers(base.config))


def positions(base: Any, input_ids: Tensor, virtual_tokens: int, start: int = 0) -> Tensor:
    """Return the positions that tokens have behind a prefix where none are given, [1 or B, S]."""
    embeddings = getattr(getattr(base, base.base_model_prefix, base), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    if padding is not None:  # RoBERTa counts the tokens that are not padding
        kept = input_ids.ne(padding).long()
        return (kept.cumsum(1) + virtual_tokens) * kept + padding
    first = start + virtual_tokens
    return torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]


def _table(model: Any) -> Tensor:
    """Return the active adapter's table, [P, 2 · layers, Hkv, d], in the base model's dtype."""
    config = model.active_peft_config
    encoder = model.prompt_encoder[model.active_adapter]
    table = encoder.embedding.weight
    if encoder.prefix_projection and not config.inference_mode:
        table = encoder.transform(table)
    kv_heads, head_dim = _sizes(config)
    return table.to(model.base_model_torch_dtype or table.dtype).unflatten(
        -1, (2 * config.num_layers, kv_heads, head_dim)
    )


def _sizes(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.token_dim // config.num_attention_heads


def _windowed(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types:
        return any(each != "full_attention" for each in types)
    window = getattr(config, "sliding_window", None)
    return bool(window) and bool(getattr(config, "use_sliding_window", True))


def _holders(base: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that hold an attention layer, it too, but for lists of layers."""
    parts = name.split(".")
    held = [base.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]
    return [each for each in held if not isinstance(each, nn.ModuleList)]


def _passes_any(module: nn.Module) -> bool:
    """Return whether a forward takes any keyword arguments, and does not let them drop."""
    forward = inspect.unwrap(module.forward)
    parameters = inspect.signature(forward).parameters.values()
    names = [each.name for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
    code = getattr(forward, "__code__", None)
    if not names or code is None:
        return bool(names)
    for step in dis.get_instructions(code):
        # From Python 3.13 on one instruction may load two names.
        loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if "LOAD" in step.opname and names[0] in loaded:
            return True
    return False


def _is_reentrant(base: nn.Module) -> bool:
    """Return whether layers are checkpointed by transformers in the reentrant way."""
    if not base.training:
        return False
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


def _drops_layers(config: Any) -> bool:
    return bool(getattr(config, "layerdrop", 0) or getattr(config, "encoder_layerdrop", 0))
