"""The forms that benchmarks call peft's: what its models pass to torch, they pass too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.prefix import eager_form
from bench.prompt import peft_form

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.external

VOCABULARY, LENGTH = 19, 5


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(0)}


def test_the_prompts_form_is_what_pefts_model_gives_the_base_model() -> None:
    base, given, seen = llama(), inputs(), {}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    model = peft.get_peft_model(base, config)
    hook = lambda module, args, kwargs: seen.update(kwargs)  # noqa: E731
    base.register_forward_pre_hook(hook, with_kwargs=True)
    model(**given)
    prompt = model.prompt_encoder.default.embedding.weight
    embeddings, mask, labels = peft_form(
        given["input_ids"], base.get_input_embeddings().weight, prompt, given["attention_mask"],
        given["labels"],
    )  # fmt: skip
    assert torch.equal(seen["inputs_embeds"], embeddings)
    assert torch.equal(seen["attention_mask"], mask) and mask.dtype == seen["attention_mask"].dtype
    assert torch.equal(seen["labels"], labels) and labels.dtype == seen["labels"].dtype
    dy = torch.randn_like(embeddings)
    theirs, ours = (
        torch.autograd.grad(each, prompt, dy, retain_graph=True)[0]
        for each in (seen["inputs_embeds"], embeddings)
    )
    assert torch.equal(theirs, ours)


def test_the_prefixs_eager_form_calls_sdpa_as_transformers_does_under_peft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[torch.Tensor, ...]] = []
    attend = F.scaled_dot_product_attention

    def recorded(q: Any, k: Any, v: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        assert not options.get("enable_gqa") and not options.get("is_causal")
        calls.append((q, k, v, attn_mask))
        return attend(q, k, v, attn_mask=attn_mask)

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    model = peft.get_peft_model(llama(), config)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    model(**inputs())
    ((q, keys, values, mask),) = calls
    assert keys.shape[1] == q.shape[1] == 4, "heads are repeated"
    once = (each[:, ::2] for each in (keys, values))
    (k, prefix_k), (v, prefix_v) = ((each[:, :, LENGTH:], each[0, :, :LENGTH]) for each in once)
    eager_form(q, k, v, prefix_k, prefix_v, mask[0, 0])
    for theirs, ours in zip(calls[0][:3], calls[1][:3], strict=True):
        assert torch.equal(theirs, ours)
    assert mask.dtype == torch.bool and torch.equal(mask[:1], calls[1][3])
