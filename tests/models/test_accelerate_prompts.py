"""``accelerate`` on prompt learning of peft: the same results, the same model afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import accelerate, prefix_attention, prompt_embedding, unaccelerate
from peft_kernels.models.attention import bridge as transformers_bridge
from peft_kernels.models.fused import peft_prompts
from tests.models.peft_models import (
    VOCABULARY,
    assert_same,
    built,
    llama,
    lora_config,
    pair,
    tokens,
)

# What peft and torch say of what is done here.
pytestmark = [pytest.mark.external] + [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("Position ids are not", "Adapter default was active", "None of the inputs have")
]

VIRTUAL = 3
LENGTH = 9
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
        initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=1, scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def qwen(**changes: Any) -> nn.Module:
    options = SIZES | {"num_key_value_heads": 2} | changes
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**options))


def stable_lm() -> nn.Module:
    """Return a model whose layers take any arguments and drop them."""
    config = transformers.StableLmConfig(**SIZES, num_key_value_heads=2)
    return transformers.StableLmForCausalLM(config)


def bert(head: str) -> nn.Module:
    labels = {"num_labels": 2} if head == "ForQuestionAnswering" else {}
    config = transformers.BertConfig(**(SIZES | NO_DROPOUT | labels))
    return getattr(transformers, f"Bert{head}")(config)  # type: ignore[no-any-return]


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SIZES, **NO_DROPOUT)
    return transformers.RobertaForTokenClassification(config)


CAUSAL = {"llama": lambda: llama(initializer_range=0.3), "gpt2": gpt2, "qwen": qwen}
HEADS = {
    "sequence": ("SEQ_CLS", lambda: bert("ForSequenceClassification")),
    "token": ("TOKEN_CLS", lambda: bert("ForTokenClassification")),
    "roberta": ("TOKEN_CLS", roberta),
    "question": ("QUESTION_ANS", lambda: bert("ForQuestionAnswering")),
    "features": ("FEATURE_EXTRACTION", lambda: bert("Model")),
}


def prefix(task: str = "CAUSAL_LM", **options: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL, **options)


def projected(task: str = "CAUSAL_LM") -> PrefixTuningConfig:
    return prefix(task, prefix_projection=True, encoder_hidden_size=16)


def prompt(task: str = "CAUSAL_LM") -> PromptTuningConfig:
    return PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)


def p_tuning(task: str = "CAUSAL_LM", kind: str = "MLP") -> PromptEncoderConfig:
    return PromptEncoderConfig(
        task_type=task, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16,
        encoder_reparameterization_type=kind, encoder_dropout=0.0,
    )  # fmt: skip


METHODS = {
    "prefix": prefix,
    "projected prefix": projected,
    "prompt": prompt,
    "p-tuning": p_tuning,
    "p-tuning lstm": lambda task="CAUSAL_LM": p_tuning(task, "LSTM"),
}
PREFIXES = ("prefix", "projected prefix")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often each kernel was called, and with how many virtual tokens."""
    counter: Counter[str] = Counter()

    def attention(*args: Any, **kwargs: Any) -> Any:
        prefix_key = args[3]
        assert prefix_key.dim() == 3
        counter["prefix_attention"] += prefix_key.shape[1] == VIRTUAL
        counter["attention alone"] += prefix_key.shape[1] == 0
        return prefix_attention(*args, **kwargs)

    def embedding(*args: Any, **kwargs: Any) -> Any:
        counter["prompt_embedding"] += args[2].shape[-2] == VIRTUAL
        return prompt_embedding(*args, **kwargs)

    monkeypatch.setattr(transformers_bridge, "prefix_attention", attention)
    monkeypatch.setattr(peft_prompts, "prompt_embedding", embedding)
    return counter


def batch(side: str | None = None, *, rows: int = 3) -> dict[str, Tensor]:
    """Return token ids of texts of several lengths, padded on one side, or all of one length."""
    ids = tokens(rows, LENGTH)
    if side is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 4, 2)):
        mask[row, slice(missing) if side == "left" else slice(LENGTH - missing, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def results(model: nn.Module, *, backward: bool = True, **inputs: Any) -> dict[str, Tensor]:
    """Return the outputs of a model and the gradients of what is trained, by name."""
    model.zero_grad()
    output = model(**inputs)
    found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    if backward:
        loss = output.get("loss")
        (found["last_hidden_state"].square().mean() if loss is None else loss).backward()
        named = model.named_parameters()
        found |= {f"base_model.{n}": p.grad for n, p in named if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}


def causal(side: str | None = None) -> dict[str, Tensor]:
    inputs = batch(side)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 0, -100)
    return inputs | {"labels": labels}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_same_results(family: str, method: str, side: str | None, calls: Any) -> None:
    torch.manual_seed(0)
    model, plain = pair(METHODS[method](), CAUSAL[family]())
    report = accelerate(model, strict=True)
    op = "prefix_attention" if method in PREFIXES else "prompt_embedding"
    assert report.accelerated == (("", op),)
    assert list(model.state_dict()) == list(plain.state_dict())
    kept = causal(side).get("attention_mask")
    actual, expected = (results(each, **causal(side)) for each in (model, plain))
    if kept is not None:
        # What stands at padding means nothing; left of a text no key is left to see but a prefix.
        for each in (actual, expected):
            each["logits"] = each["logits"][:, -LENGTH:] * kept[..., None]
    assert_same(actual, expected)
    assert calls[op] == (2 if method in PREFIXES else 1)


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_heads_same_results(head: str, method: str, side: str | None, calls: Any) -> None:
    task, build = HEADS[head]
    torch.manual_seed(0)
    model, plain = pair(METHODS[method](task), build())
    accelerate(model, strict=True)
    inputs: dict[str, Any] = batch(side)
    generator = torch.Generator().manual_seed(3)
    columns = LENGTH if method in PREFIXES else LENGTH + VIRTUAL
    if task == "SEQ_CLS":
        inputs["labels"] = torch.randint(3, (3,), generator=generator)
        inputs["token_type_ids"] = torch.randint(2, (3, LENGTH), generator=generator)
    elif task == "TOKEN_CLS":
        inputs["labels"] = torch.randint(3, (3, columns), generator=generator)
    elif task == "QUESTION_ANS":
        inputs |= {
            "start_positions": torch.tensor([0, 2, 1]),
            "end_positions": torch.ones(3).long(),
        }
    assert_same(results(model, **inputs), results(plain, **inputs))
    assert calls["prefix_attention" if method in PREFIXES else "prompt_embedding"] > 0


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_encoder_decoder_same_results(method: str, calls: Any) -> None:
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    model, plain = pair(METHODS[method]("SEQ_2_SEQ_LM"), base)
    accelerate(model, strict=True)
    inputs = batch("right") | {"labels": tokens(3, 5)}
    assert_same(results(model, **inputs), results(plain, **inputs))
    assert calls["prompt_embedding"] == 1
    given = batch("right")
    actual, expected = (each.generate(**given, max_new_tokens=5) for each in (model, plain))
    assert torch.equal(actual, expected)


def test_multitask_prompts_differ_by_row(calls: Any) -> None:
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, num_tasks=2, num_ranks=2,
        prompt_tuning_init="RANDOM",
    )  # fmt: skip
    model, plain = pair(config)
    accelerate(model, strict=True)
    inputs = causal("left") | {"task_ids": torch.tensor([1, 0, 1])}
    assert_same(results(model, **inputs), results(plain, **inputs))
    assert calls["prompt_embedding"] == 1


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("method", ["prefix", "projected prefix", "prompt", "p-tuning"])
@pytest.mark.parametrize("family", CAUSAL)
def test_generates_the_same(family: str, method: str, side: str | None, calls: Any) -> None:
    torch.manual_seed(0)
    model, plain = pair(METHODS[method](), CAUSAL[family]())
    accelerate(model)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for each in (model, plain):
        each.eval()
    actual, expected = (each.generate(**batch(side), **options) for each in (model, plain))
    assert torch.equal(actual, expected)
    assert len(expected[:, LENGTH:].unique()) > 3
    assert calls["prefix_attention"] == (2 * 6 if method in PREFIXES else 0)


def test_generates_the_same_in_beams(calls: Any) -> None:
    model, plain = pair(prefix(), CAUSAL["llama"]())
    accelerate(model)
    options = {"max_new_tokens": 5, "num_beams": 3, "eos_token_id": None}
    actual, expected = (each.eval().generate(**batch("left"), **options) for each in (model, plain))
    assert torch.equal(actual, expected)


def test_generation_goes_on_from_its_cache(calls: Any) -> None:
    model = built(prefix(), CAUSAL["llama"]()).eval()  # peft's own fails to go on
    accelerate(model)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first = model.generate(**batch(), **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, batch()["input_ids"][:, :2]], 1)
    again = model.generate(input_ids=ids, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, model.generate(input_ids=ids, **options))
    assert calls["attention alone"] == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CAUSAL)
def test_checkpointing_changes_no_gradient(
    family: str, method: str, reentrant: bool, calls: Any
) -> None:
    torch.manual_seed(0)
    model, plain = pair(METHODS[method](), CAUSAL[family]())
    accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = causal("left")
    model.train()
    output = model(**inputs)
    before = calls["prefix_attention"]
    with model.disable_adapter():  # another call meanwhile, without the prompt
        model(**batch())
    output.loss.backward()
    if method in PREFIXES:
        assert calls["prefix_attention"] == 2 * before == 4
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = results(plain, **inputs)
    expected = {n.removeprefix("base_model."): g for n, g in expected.items() if "." in n}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-5 * value.abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=bound, msg=name)


def test_reentrant_without_gradients_of_the_embeddings_raises() -> None:
    model = built(prefix())
    accelerate(model)
    layers = model.base_model.model.layers
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)
    with pytest.raises(RuntimeError, match="enable_input_require_grads"):
        model(**causal())
    model.enable_input_require_grads()
    model(**causal()).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().min() > 0


def _checkpointed(forward: Any) -> Any:
    def run(hidden: Tensor, **kwargs: Any) -> Any:
        return checkpoint(partial(forward, **kwargs), hidden, use_reentrant=True)

    return run


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_disabled_is_the_base_model(method: str, calls: Any) -> None:
    model, plain = pair(METHODS[method]())
    accelerate(model)
    for each in (model, plain):
        each.eval()
    for _ in range(2):
        with model.disable_adapter(), plain.disable_adapter():
            actual, expected = (each(**batch("left")).logits for each in (model, plain))
            assert torch.equal(actual, expected)
            options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
            actual, expected = (
                each.generate(**batch("left"), **options) for each in (model, plain)
            )
            assert torch.equal(actual, expected)
        assert not calls
    assert_same(results(model, **causal()), results(plain, **causal()))
    assert calls


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_the_kernels_do_not_take_is_peft_s_forward(method: str, calls: Any) -> None:
    base = llama(attn_implementation="eager")
    model, plain = pair(METHODS[method](), base)
    accelerate(model)
    embeddings = plain.word_embeddings(batch()["input_ids"]).detach()
    columns = LENGTH + VIRTUAL
    mask = torch.ones(3, 1, columns if method == "prompt" else LENGTH, columns).tril(VIRTUAL)
    given: list[dict[str, Any]] = [{"inputs_embeds": embeddings}]
    if method == "prefix":
        given.append({**batch(), "output_attentions": True})
    for inputs in given:
        for each in (model, plain):
            each.zero_grad()
        actual, expected = model(**inputs), plain(**inputs)
        assert torch.equal(actual.logits, expected.logits)
        if "output_attentions" in inputs:
            assert torch.equal(actual.attentions[1], expected.attentions[1])
    assert mask.dim() == 4 and not calls
    with pytest.raises(RuntimeError):  # peft cannot concatenate its mask with one of 4 dimensions
        plain(**batch(), attention_mask=mask)
    with pytest.raises(RuntimeError):
        model(**batch(), attention_mask=mask)


def test_positions_given_are_shifted_as_peft_does() -> None:
    model, plain = pair(prefix())
    accelerate(model)
    inputs = causal("left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    actual, expected = (
        results(each, **inputs, position_ids=positions.clone()) for each in (model, plain)
    )
    for each in (actual, expected):
        each["logits"] = each["logits"] * inputs["attention_mask"][..., None]
    assert_same(actual, expected)
    other = results(plain, **inputs)["logits"] * inputs["attention_mask"][..., None]
    assert not torch.allclose(other, expected["logits"], atol=1e-3)


@pytest.mark.parametrize("method", ["prefix", "projected prefix", "prompt"])
def test_adapters_of_peft_come_and_go(method: str, calls: Any, tmp_path: Path) -> None:
    model, plain = pair(METHODS[method]())
    accelerate(model)
    for each in (model, plain):
        torch.manual_seed(5)
        each.add_adapter("other", METHODS[method]())
        each.set_adapter("other")
    other = results(model, **causal())
    assert_same(other, results(plain, **causal()))
    for each in (model, plain):
        each.set_adapter("default")
    assert_same(results(model, **causal()), results(plain, **causal()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    accelerate(loaded, strict=True)
    before = sum(calls.values())
    logits = results(plain, **causal())["logits"]
    torch.testing.assert_close(loaded(**causal()).logits, logits, rtol=1e-4, atol=1e-5)
    assert sum(calls.values()) > before
    for each in (model, plain):
        each.delete_adapter("default")
    assert_same(results(model, **causal()), other)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_undone_and_copied(method: str, calls: Any) -> None:
    base = llama(attn_implementation="eager")
    model, plain = pair(METHODS[method](), base)
    keys = set(vars(plain))
    accelerate(model)
    accelerate(model)
    with model.disable_adapter():
        pass
    copied = copy.deepcopy(model)
    stream = io.BytesIO(pickle.dumps(model))
    pickled = pickle.load(stream)
    expected = results(plain, **causal())
    for each in (copied, pickled, model):
        before = sum(calls.values())
        assert_same(results(each, **causal()), expected)
        assert sum(calls.values()) > before
        assert unaccelerate(each) == [""]
        assert type(each) is type(plain) is peft.PeftModelForCausalLM
        assert each.base_model.config._attn_implementation == "eager"
        assert set(vars(each)) == keys
        after = sum(calls.values())
        assert_same(results(each, **causal()), expected)
        assert sum(calls.values()) == after
        assert unaccelerate(each) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_report_says_why_not() -> None:
    windowed = qwen(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    skipped = {
        "sliding window": built(prefix(), windowed),
        "StableLmDecoderLayer does not pass arguments on": built(prefix(), stable_lm()),
        "task_type": PeftModel(llama(), PromptTuningConfig(num_virtual_tokens=VIRTUAL)),
        "encoder-decoder": built(
            prefix("SEQ_2_SEQ_LM"),
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                )
            ),
        ),
    }  # fmt: skip
    hooked = built(prompt())
    hooked.word_embeddings.register_forward_hook(lambda *_: None)
    skipped["hooks"] = hooked
    for reason, model in skipped.items():
        with pytest.raises(ValueError, match=reason):
            accelerate(model)
    holder = nn.ModuleDict({"lora": built(lora_config()), **{"prefix": built(prefix())}})
    report = accelerate(holder, strict=True)
    ops = Counter(op for _, op in report.accelerated)
    assert ("prefix", "prefix_attention") in report.accelerated
    assert set(ops) == {"lora_linear", "prefix_attention"} and ops["prefix_attention"] == 1


def test_meta_is_refused() -> None:
    model = built(prefix()).to("meta")
    with pytest.raises(ValueError, match="meta"):
        accelerate(model)


def test_attention_changed_afterwards_is_noticed() -> None:
    model = built(prefix())
    accelerate(model)
    model.base_model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="2 of 2 attention layers"):
        model(**causal())


def test_bfloat16_base_beside_a_float32_prefix(calls: Any) -> None:
    base = llama(initializer_range=0.3).to(torch.bfloat16)
    model, plain = pair(prefix(), base)
    accelerate(model)
    actual, expected = results(model, **causal()), results(plain, **causal())
    exact = results(copy.deepcopy(plain).double(), **causal())
    for name, value in exact.items():
        assert actual[name].dtype == expected[name].dtype
        errors = [(each[name].double() - value).norm() for each in (actual, expected)]
        assert errors[0] <= 1.5 * errors[1] + 2**-9 * value.norm(), name
    assert calls["prefix_attention"] == 2
