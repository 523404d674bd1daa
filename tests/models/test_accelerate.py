"""``accelerate`` on LoRA models of peft: the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_kernels import (
    accelerate,
)
from tests.models.peft_models import (
    assert_same,
    built,
    llama,
    logits_and_gradients,
    lora_config,
    pair,
    seeded_logits,
    tokens,
)

pytestmark = pytest.mark.external

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "ranks": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "trained biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_same_logits_and_gradients(options: dict[str, Any], fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(**options))
    report = accelerate(model, strict=True)
    assert {op for _, op in report.accelerated} == {"lora_linear"}
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == len(report.accelerated) > 0


@pytest.mark.parametrize("biased", [False, True], ids=["bare base", "base with biases"])
def test_bias_of_the_adapter(biased: bool, fused_calls: list[float]) -> None:
    base = llama(attention_bias=biased)
    model, plain = pair(lora_config(target_modules=["q_proj", "v_proj"], lora_bias=biased), base)
    accelerate(model, strict=True)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == 4


def test_conv1d_of_gpt2(fused_calls: list[float]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip
    config = lora_config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model, plain = pair(config, base)
    accelerate(model, strict=True)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == 6


def test_dropout_acts_in_training_alone_and_isseeded_logits(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(lora_dropout=0.25))
    accelerate(model, strict=True)
    first, again, other = (seeded_logits(model, seed) for seed in (3, 3, 4))
    assert set(fused_calls) == {0.25}
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.eval(), plain.eval()
    torch.testing.assert_close(
        seeded_logits(model, 3), seeded_logits(plain, 3), rtol=2e-5, atol=2e-6
    )


def test_dropout_has_the_mean_and_spread_of_pefts() -> None:
    """The masks differ by design: what they do to one layer's output must not."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48))
    config = LoraConfig(r=8, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
    model, plain = pair(config, base)
    accelerate(model)
    x = torch.randn(1, 64).expand(4000, 64)
    with torch.no_grad():
        ours, theirs, whole = model(x), plain(x), plain.eval()(x[:1])
    error = theirs.std(0) / 4000**0.5
    assert ((ours.mean(0) - whole[0]).abs() < 5 * error).all()
    assert ((theirs.mean(0) - whole[0]).abs() < 5 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kept", [True, False], ids=["adapters in float32", "adapters alike"])
def test_sixteen_bits_are_as_accurate_as_pefts(
    kept: bool, kind: torch.dtype, fused_calls: list[float]
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 80)).to(kind)
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    plain = get_peft_model(base, config, autocast_adapter_dtype=kept)
    exact = copy.deepcopy(plain).double()
    model = copy.deepcopy(plain)
    accelerate(model)
    x, dy = torch.randn(200, 96).to(kind), torch.randn(200, 80).to(kind)
    ours, theirs = _results(model, x, dy), _results(plain, x, dy)
    truth = _results(exact, x.double(), dy.double())
    assert len(fused_calls) == 1
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        unit = torch.finfo(kind).eps / 2 * truth[name].abs().max()
        limit = 1.5 * (theirs[name] - truth[name]).abs().max() + unit
        assert (value - truth[name]).abs().max() <= limit, name


def _results(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_autocast(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config())
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = logits_and_gradients(model), logits_and_gradients(plain)
    exact = logits_and_gradients(plain)
    assert len(fused_calls) == 14
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in theirs.items()}
    gradients = [name for name in exact if name.startswith("base_model")]
    # Roundings travel through the whole model: of one small gradient the error is luck.
    for names in (["logits"], gradients):
        distance = _distance(theirs, exact, names)
        assert 0 < _distance(ours, exact, names) <= 1.5 * distance


def _distance(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], names: list[str]
) -> float:
    return torch.cat([(found[name] - exact[name]).flatten() for name in names]).norm().item()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_gradient_checkpointing(reentrant: bool, fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(lora_dropout=0.2))
    accelerate(model)
    torch.manual_seed(7)
    expected = logits_and_gradients(model)
    calls = len(fused_calls)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(7)
    actual = logits_and_gradients(model)
    assert len(fused_calls) > 2 * calls  # twice in the second pass
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_layers_compile_whole() -> None:
    model = built(lora_config())
    accelerate(model)
    layer = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    expected = layer(x)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    actual = torch.compile(layer, fullgraph=True)(x)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    for name, value in gradients.items():
        found = layer.get_parameter(name).grad
        torch.testing.assert_close(found, value, rtol=2e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_whole_model_compiles_without_a_break(options: dict[str, Any]) -> None:
    model, plain = pair(lora_config(**options))
    accelerate(model)
    ids = tokens()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = whole(input_ids=ids, labels=ids.clone()).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = logits_and_gradients(plain)
    torch.testing.assert_close(loss, expected["loss"])
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=1e-5, msg=name)
