"""Small transformers models with prefixes, and plain attention to hold them against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, masking_utils  # noqa: E402

from peft_kernels.models.attention.bridge import IMPLEMENTATION, attach_prefixes  # noqa: E402

VIRTUAL = 5
LENGTHS = (9, 4, 6)  # of the texts in a batch
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {
    **SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY))


def qwen() -> nn.Module:
    config = transformers.Qwen2Config(
        **ROTARY, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    return transformers.Qwen2ForCausalLM(config)


def mistral() -> nn.Module:
    config = transformers.MistralConfig(**ROTARY, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
        initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        **ROTARY, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
    )
    return transformers.Llama4ForCausalLM(config)


FAMILIES = {"llama": llama, "qwen": qwen, "mistral": mistral, "gpt2": gpt2, "bert": bert}
CAUSAL = ("llama", "qwen", "mistral", "gpt2")


def make(family: str, **options: object) -> nn.Module:
    """Return a frozen model with prefixes whose values, gates too, are of the size of keys."""
    torch.manual_seed(1)
    model = FAMILIES[family]().eval().requires_grad_(False)
    attach_prefixes(model, num_virtual_tokens=VIRTUAL, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if IMPLEMENTATION in name and "projection" not in name:
                parameter.normal_()
    return model


def batch(side: str | None = None) -> dict[str, Tensor]:
    """Return token ids of three texts, padded on one side, with their mask; None: none padded."""
    generator = torch.Generator().manual_seed(2)
    longest = max(LENGTHS)
    ids = torch.randint(2, 50, (3, longest), generator=generator)
    if side is None:
        return {"input_ids": ids}
    mask = torch.zeros(3, longest, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(longest - length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def dense_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):  # type: ignore[no-untyped-def]
    """Attention as the papers write it: prefix and keys concatenated, one dense mask."""
    if scaling is None:  # GPT-2 of transformers 4
        scaling = query.shape[-1] ** -0.5 / (module.layer_idx + 1)
    tokens = getattr(module, IMPLEMENTATION, None)
    batch, heads, queries, size = query.shape
    repeat = heads // key.shape[1]
    key, value = (each.repeat_interleave(repeat, 1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if tokens is None:
        return (scores.softmax(-1) @ value).transpose(1, 2), None
    prefix_key, prefix_value = (
        each.repeat_interleave(repeat, 0).to(query.dtype) for each in tokens.virtual_tokens()
    )
    prefix_scores = query @ prefix_key.transpose(-1, -2) * scaling
    if tokens.gate is not None:
        gate = tokens.gate.to(query.dtype).tanh()[:, None, None]
        out = scores.softmax(-1) @ value + gate * (prefix_scores.softmax(-1) @ prefix_value)
    else:
        weights = torch.cat([prefix_scores, scores], -1).softmax(-1)
        out = weights[..., :VIRTUAL] @ prefix_value + weights[..., VIRTUAL:] @ value
    return out.transpose(1, 2), None


@contextmanager
def dense() -> Iterator[None]:
    """Let the registered implementation be the dense attention with transformers' own mask."""
    mappings = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    ours = [mapping[IMPLEMENTATION] for mapping in mappings]
    theirs = dense_attention, masking_utils.eager_mask
    try:
        for mapping, function in zip(mappings, theirs, strict=True):
            mapping[IMPLEMENTATION] = function
        yield
    finally:
        for mapping, function in zip(mappings, ours, strict=True):
            mapping[IMPLEMENTATION] = function


def logits_and_gradients(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return logits where there are tokens, and the gradient of every trained parameter."""
    model.zero_grad()
    logits = model(**given).logits
    if "attention_mask" in given:
        logits = logits[given["attention_mask"].bool()]
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * weights.to(logits)).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert all(IMPLEMENTATION in name for name in gradients)
    return {"logits": logits.detach(), **gradients}


def assert_is_dense_attention(model: nn.Module, given: dict[str, Any]) -> None:
    """Compare with the dense form, in float64 and, on the fused kernels, in float32.

    What a model makes of a kernel's last digit has no bound of its own: the kernels are held to the
    1.5x rule by themselves, and here to within 1e-5 of the largest value.
    """
    wide = copy.deepcopy(model).double()
    found, found_wide = logits_and_gradients(model, given), logits_and_gradients(wide, given)
    with dense():
        exact = logits_and_gradients(wide, given)
    assert found.keys() == exact.keys() and len(exact) > 1
    for name, value in exact.items():
        largest = value.abs().max()
        assert largest > 0, name
        for result, allowed in ((found_wide, 1e-11), (found, 1e-5)):
            error = (result[name] - value).abs().max()
            assert error <= allowed * largest, f"{name}: {error} of {largest}"
