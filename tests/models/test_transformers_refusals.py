"""Prefixes in transformers models: what is refused, by name, instead of computed wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from peft_kernels.models.attention.bridge import IMPLEMENTATION, attach_prefixes  # noqa: E402
from tests.models.prefixed_models import ROTARY, batch, llama, llama4, make  # noqa: E402


@pytest.mark.parametrize("columns", [0, 3])
def test_a_mask_that_ends_early_is_refused(columns: int) -> None:
    ids = batch()["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask must reach the last query"):
        make("llama")(input_ids=ids, attention_mask=torch.ones_like(ids[:, :columns]))


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
