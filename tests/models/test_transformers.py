"""Prefixes in transformers models, against plain attention over concatenated prefixes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, masking_utils  # noqa: E402

from peft_kernels.models.attention.bridge import (  # noqa: E402
    IMPLEMENTATION,
    attach_prefixes,
    detach_prefixes,
)

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


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_attention_over_prefix_and_sequence(family: str, side: str | None) -> None:
    assert_is_dense_attention(make(family), batch(side))


@pytest.mark.parametrize("options", [{"gated": True}, {"prefix_projection": True}], ids=str)
def test_gates_and_projections(options: dict[str, bool]) -> None:
    assert_is_dense_attention(make("llama", **options), batch("left"))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_sequences_by_position_ids_alone(family: str, rows: int) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1]])[:rows]
    given = {"input_ids": batch()["input_ids"][:rows], "position_ids": positions}
    model = make(family)
    # With a cache transformers' masks do not know of packing: a call without one is compared.
    assert_is_dense_attention(model, {**given, "use_cache": False})
    assert torch.equal(model(**given).logits, model(**given, use_cache=False).logits)
    alone = model(input_ids=given["input_ids"][:1, 3:]).logits
    torch.testing.assert_close(model(**given).logits[:1, 3:], alone, atol=1e-5, rtol=1e-5)


def test_packed_sequences_by_given_offsets() -> None:
    model = make("llama")
    ids, positions = batch()["input_ids"][:1], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    offsets = torch.tensor([0, 3, 9], dtype=torch.int32)
    given = model(
        input_ids=ids, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
        max_length_q=6, max_length_k=6,
    ).logits  # fmt: skip
    assert torch.equal(given, model(input_ids=ids, position_ids=positions).logits)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_generate_gives_the_same_tokens_with_any_cache(family: str, shift: bool) -> None:
    model = make(family, shift_positions=shift)
    given = batch("left")
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    with dense():
        expected = model.generate(**given, **options, use_cache=False)
    assert torch.equal(model.generate(**given, **options, use_cache=False), expected)
    assert torch.equal(model.generate(**given, **options), expected)
    static = model.generate(**given, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    # The texts alone, without padding, are continued by the same tokens.
    for row, length in enumerate(LENGTHS):
        alone = model.generate(given["input_ids"][row : row + 1, -length:], **options)
        assert torch.equal(alone[0, -7:], expected[row, -7:])
    detach_prefixes(model)
    assert not torch.equal(model.generate(**given, **options), expected)


def test_a_static_cache_without_a_mask() -> None:
    model, ids = make("llama"), batch()["input_ids"]
    cache = transformers.StaticCache(model.config, max_cache_len=20)
    first = model(input_ids=ids[:, :6], past_key_values=cache).logits
    second = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family: str, reentrant: bool) -> None:
    model, given = make(family).train(), batch("right")
    plain = logits_and_gradients(model, given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    hooked = next(module for name, module in model.named_modules() if name.endswith(IMPLEMENTATION))
    original = hooked.virtual_tokens
    hooked.virtual_tokens = lambda: (calls.append(1), original())[1]
    found = logits_and_gradients(model, given)
    assert len(calls) == 2  # forward, and again for backward
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_shifted_positions_it_is_pefts_prefix_tuning(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = make(family, shift_positions=True)
    torch.manual_seed(1)
    base = FAMILIES[family]().eval()
    base.set_attn_implementation("eager")
    tuned = peft.get_peft_model(
        base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    ).eval()
    rows = tuned.prompt_encoder["default"].embedding.weight  # [P, layers · 2 · Hkv · d]
    prefixes = [m for name, m in model.named_modules() if name.endswith(IMPLEMENTATION)]
    with torch.no_grad():
        parts = rows.normal_().unflatten(1, (2 * len(prefixes), -1, 8)).permute(1, 2, 0, 3)
        for index, tokens in enumerate(prefixes):
            tokens.prefix_key.copy_(parts[2 * index])
            tokens.prefix_value.copy_(parts[2 * index + 1])
    given = batch("right")
    keep = given["attention_mask"].bool()
    ours, theirs = model(**given).logits[keep], tuned(**given).logits[keep]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    detach_prefixes(model)
    assert (model(**given).logits[keep] - theirs).abs().max() > 0.1


def test_reused_positions_are_looked_at_again() -> None:
    model, ids = make("llama"), batch()["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    packed = model(input_ids=ids, position_ids=positions).logits
    positions.copy_(torch.arange(9)[None])
    whole = model(input_ids=ids, position_ids=positions).logits
    assert torch.equal(whole, model(input_ids=ids).logits)
    assert not torch.equal(whole, packed)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models_see_packed_sequences() -> None:
    model, ids = make("llama"), batch()["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    expected = model(input_ids=ids, position_ids=positions).logits
    compiled = torch.compile(model, backend="aot_eager")
    for positions_ in (positions, positions.clone()):
        found = compiled(input_ids=ids, position_ids=positions_).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    alone = compiled(input_ids=ids, position_ids=torch.arange(9)[None]).logits
    torch.testing.assert_close(alone, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [None, "right"])
def test_a_text_tower_that_says_is_causal_with_every_call(side: str | None) -> None:
    """CLIP's layers are not causal by themselves: each call says that it is."""
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        **SIZES, intermediate_size=48, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config).eval().double().requires_grad_(False)
    attach_prefixes(model, num_virtual_tokens=VIRTUAL, dtype=torch.float64)
    given = batch(side)
    found = model(**given).last_hidden_state
    with dense():
        exact = model(**given).last_hidden_state
    keep = given.get("attention_mask", torch.ones(3, 9)).bool()
    torch.testing.assert_close(found[keep], exact[keep], atol=1e-10, rtol=1e-10)


def test_rotaries_that_are_told_more_than_positions_are_shifted() -> None:
    torch.manual_seed(1)
    config = transformers.Gemma3TextConfig(
        **{**ROTARY, "head_dim": 8, "num_hidden_layers": 2, "sliding_window": 4},
        layer_types=["sliding_attention", "full_attention"],
    )
    model = transformers.Gemma3ForCausalLM(config).eval().double().requires_grad_(False)
    attach_prefixes(model, num_virtual_tokens=VIRTUAL, shift_positions=True, dtype=torch.float64)
    found = model(**batch("left")).logits
    mask = batch("left")["attention_mask"].bool()
    with dense():
        exact = model(**batch("left")).logits
    torch.testing.assert_close(found[mask], exact[mask], atol=1e-9, rtol=1e-9)
    positions = torch.arange(9)[None] + VIRTUAL
    shifted = model(input_ids=batch()["input_ids"]).logits
    detach_prefixes(model)
    attach_prefixes(model, num_virtual_tokens=0)
    assert (model(input_ids=batch()["input_ids"], position_ids=positions).logits - shifted).any()


def test_cross_attention_is_left_alone() -> None:
    torch.manual_seed(1)
    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.3,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval().requires_grad_(False)
    names = attach_prefixes(model, num_virtual_tokens=VIRTUAL)
    assert names == ["model.encoder.layers.0.self_attn", "model.decoder.layers.0.self_attn"]
    given = {**batch("right"), "decoder_input_ids": batch()["input_ids"][:, :4]}
    ours = model(**given).logits
    with dense():
        torch.testing.assert_close(ours, model(**given).logits, atol=1e-4, rtol=1e-4)


def test_targets_choose_layers() -> None:
    torch.manual_seed(1)
    model = llama().eval()
    assert attach_prefixes(model, num_virtual_tokens=2, targets="1.self_attn") == [
        "model.layers.1.self_attn"
    ]
    with pytest.raises(ValueError, match=r"targets \['attention'\] matched no self-attention"):
        attach_prefixes(llama(), num_virtual_tokens=2, targets="attention")


def test_attached_and_detached_models_pickle_and_copy() -> None:
    model, given = make("llama", shift_positions=True), batch("left")
    expected = model(**given).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**given).logits, expected)
        detach_prefixes(other)
        assert not torch.equal(other(**given).logits, expected)
    assert torch.equal(model(**given).logits, expected)


def test_detaching_restores_the_model() -> None:
    torch.manual_seed(1)
    model, given = mistral().eval(), batch("left")
    expected, before = model(**given).logits, list(model.state_dict())
    attach_prefixes(model, num_virtual_tokens=3, shift_positions=True)
    assert len(model.state_dict()) == len(before) + 4
    for each in (model, model.model):
        with pytest.raises(ValueError, match="has prefixes already"):
            attach_prefixes(each, num_virtual_tokens=3)
    detach_prefixes(model)
    assert list(model.state_dict()) == before
    assert torch.equal(model(**given).logits, expected)
    with pytest.raises(ValueError, match="no prefixes"):
        detach_prefixes(model)


def test_another_attention_afterwards_raises() -> None:
    model, given = make("llama"), batch()
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="changed to 'sdpa', which ignores the prefixes"):
        model(**given)
    model.set_attn_implementation(IMPLEMENTATION)
    model(**given)


def test_what_has_no_kernel_is_refused_by_name() -> None:
    model, given = make("llama"), batch()
    square = torch.zeros(3, 1, 9, 9)
    with pytest.raises(ValueError, match="2-D mask of padding"):
        model(**given, attention_mask=square)
    with pytest.raises(ValueError, match="output_attentions: returning attention weights"):
        model(**given, output_attentions=True)
    torch.manual_seed(1)
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**{**ROTARY, "head_dim": 8}, attn_logit_softcapping=30.0)
    )
    attach_prefixes(gemma, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="softcap: a soft cap on the scores has no kernel"):
        gemma(**given)
    chunked = llama4()
    attach_prefixes(chunked, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="chunked attention has no kernel"):
        chunked(**given)


def test_layers_that_keep_to_themselves_what_they_see_are_refused() -> None:
    torch.manual_seed(1)
    pegasus = transformers.BigBirdPegasusForCausalLM(
        transformers.BigBirdPegasusConfig(
            vocab_size=50, d_model=32, decoder_layers=1, decoder_attention_heads=4,
            decoder_ffn_dim=48, max_position_embeddings=64, encoder_layers=1,
            encoder_attention_heads=4, encoder_ffn_dim=48,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"says is_causal=False: is it causal\?"):
        attach_prefixes(pegasus, num_virtual_tokens=2)
    options = {**ROTARY, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    options |= {"num_experts": 2, "num_experts_per_tok": 1, "max_window_layers": 0}
    moe = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**options, use_sliding_window=True, sliding_window=4)
    )
    with pytest.raises(ValueError, match=r"does not tell its attention of config.sliding_window"):
        attach_prefixes(moe, num_virtual_tokens=2)
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, ffn_dim=48, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="finds no positions of 'model.decoder.layers.0.self_attn"):
        attach_prefixes(opt, num_virtual_tokens=2, shift_positions=True)
    model, given = make("llama"), batch("left")
    longer = torch.cat([given["attention_mask"], torch.ones(3, 2, dtype=torch.long)], 1)
    with pytest.raises(ValueError, match=r"must end with the last query: 9 columns, got \[3, 11"):
        model(input_ids=given["input_ids"], attention_mask=longer)


def doge() -> nn.Module:
    return transformers.DogeForCausalLM(transformers.DogeConfig(**ROTARY))


def with_an_indexer(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        **{**ROTARY, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, moe_intermediate_size=16,
        n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        n_shared_experts=1, index_topk=4, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


@pytest.mark.parametrize(
    ("name", "build", "by"),
    [
        ("DeepseekV32", with_an_indexer, "indexer"),
        ("GlmMoeDsa", with_an_indexer, "indexer"),
        ("Doge", lambda _: doge(), "prepare_dynamic_mask"),
    ],
    ids=["DeepseekV32", "GlmMoeDsa", "Doge"],
)
def test_layers_that_choose_their_keys_are_refused(
    name: str, build: Callable[[str], nn.Module], by: str
) -> None:
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(1)
    model = build(name).eval()
    given = batch("left")
    expected = model(**given).logits
    text = rf"'model.layers.0.self_attn' chooses the keys of every query by its {by}: sparse"
    with pytest.raises(ValueError, match=text):
        attach_prefixes(model, num_virtual_tokens=2)
    # Refused before anything was changed.
    assert torch.equal(model(**given).logits, expected)


def test_a_pickled_model_is_whole_in_another_process(tmp_path: Path) -> None:
    model = make("llama", shift_positions=True)
    torch.save((model, batch("left"), model(**batch("left")).logits), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, given, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, timeout=120)


@pytest.mark.parametrize("value_size", [12, 8])
def test_latent_attention_has_a_prefix_where_keys_and_values_are_of_one_size(
    value_size: int,
) -> None:
    torch.manual_seed(1)
    config = transformers.DeepseekV3Config(
        **{**ROTARY, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=value_size, first_k_dense_replace=2,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    if value_size == 8:
        with pytest.raises(ValueError, match="heads of 12 for keys and of 8 for values: head size"):
            attach_prefixes(model, num_virtual_tokens=VIRTUAL)
        assert model.config._attn_implementation != IMPLEMENTATION
        return
    attach_prefixes(model, num_virtual_tokens=VIRTUAL)
    assert_is_dense_attention(model, batch("left"))


def test_models_without_the_interface_are_refused() -> None:
    with pytest.raises(TypeError, match="must be, or hold, a transformers model, got Linear"):
        attach_prefixes(nn.Linear(2, 2), num_virtual_tokens=2)
    with pytest.raises(ValueError, match="num_virtual_tokens must be an integer of at least 0"):
        attach_prefixes(llama(), num_virtual_tokens=-1)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    attach_prefixes(t5, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="position_bias: a bias on the scores"):
        t5(**batch(), decoder_input_ids=batch()["input_ids"])
