"""Prefixes in transformers models, against plain attention over concatenated prefixes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from peft_kernels.models.attention.bridge import (  # noqa: E402
    IMPLEMENTATION,
    attach_prefixes,
    detach_prefixes,
)
from tests.models.prefixed_models import (  # noqa: E402
    CAUSAL,
    FAMILIES,
    LENGTHS,
    ROTARY,
    SIZES,
    VIRTUAL,
    assert_is_dense_attention,
    batch,
    dense,
    llama,
    logits_and_gradients,
    make,
    mistral,
)


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


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_are_no_packing_where_a_mask_is_given(use_cache: bool) -> None:
    """Skipped positions, as PoSE trains with; the mask hides nothing, which must not matter."""
    base = llama()
    model = copy.deepcopy(base)
    attach_prefixes(model, num_virtual_tokens=4, gated=True)  # closed: the model as it was
    ids = batch()["input_ids"]
    positions = torch.arange(ids.shape[1]) + 20 * (torch.arange(ids.shape[1]) > 4)
    given = {"input_ids": ids, "position_ids": positions[None], "use_cache": use_cache}
    mask = torch.ones_like(ids)
    for hidden in (0, 1):
        mask[0, :hidden] = 0
        found, expected = (m(**given, attention_mask=mask).logits for m in (model, base))
        torch.testing.assert_close(found[:, hidden:], expected[:, hidden:], atol=1e-5, rtol=1e-5)
    packed = model(**given).logits
    assert (packed - model(**given, attention_mask=torch.ones_like(ids)).logits).abs().max() > 1e-3


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
