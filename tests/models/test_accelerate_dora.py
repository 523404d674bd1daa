"""``accelerate`` on DoRA, on embeddings and on tied heads, against peft itself."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_kernels import accelerate, dora_linear, lora_embedding, lora_linear, unaccelerate
from peft_kernels.models.fused import peft_embedding, peft_lora
from tests.models.peft_models import (
    assert_same,
    built,
    llama,
    logits_and_gradients,
    lora_config,
    pair,
    tokens,
)
from tests.numerics import assert_as_accurate_as_eager

pytestmark = pytest.mark.external

EMBEDDING = ["embed_tokens"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of each function of the package that a layer calls."""
    made: list[str] = []
    functions = (
        (peft_lora, dora_linear), (peft_lora, lora_linear), (peft_embedding, lora_embedding),
    )  # fmt: skip
    for module, function in functions:

        def counted(*args: Any, _function: Any = function, **kwargs: Any) -> torch.Tensor:
            made.append(_function.__name__)
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, function.__name__, counted)
    return made


def _trained(config: LoraConfig, base: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """Return two equal models whose magnitudes are no longer the norms that they start from."""
    model = built(config, base)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            stretch = 0.5 + torch.rand(parameter.shape, generator=generator)
            parameter.data *= stretch.to(parameter.dtype)
    return copy.deepcopy(model), model


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 300}},
    "zero B": {"init_lora_weights": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "trained biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_dora_gives_the_same_logits_and_gradients(
    options: dict[str, Any], calls: list[str]
) -> None:
    biased = options.get("bias") is not None
    model, plain = _trained(
        lora_config(use_dora=True, **options), llama(attention_bias=biased, mlp_bias=biased)
    )
    report = accelerate(model, strict=True)
    assert {op for _, op in report.accelerated} == {"dora_linear"}
    assert list(model.state_dict()) == list(plain.state_dict())
    found = logits_and_gradients(model)
    assert_same(found, logits_and_gradients(plain))
    assert any("magnitude" in name and value.any() for name, value in found.items())
    assert calls == ["dora_linear"] * len(report.accelerated)


def test_dora_on_the_conv1d_of_gpt2(calls: list[str]) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96, n_positions=32, n_embd=24, n_layer=1, n_head=3,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        )
    )  # fmt: skip
    config = lora_config(
        use_dora=True, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True
    )
    model, plain = _trained(config, base)
    accelerate(model, strict=True)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert calls == ["dora_linear"] * 4


@pytest.mark.parametrize("adapters", [True, False], ids=["float32 adapters", "own dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_dora_layer_is_as_accurate_as_pefts(dtype: torch.dtype, adapters: bool) -> None:
    """In the layer's own dtype and with float32 adapters beside it, as peft makes them."""
    config = lora_config(use_dora=True, target_modules=["0"])
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 80)).to(dtype)
    exact = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=adapters)
    magnitude = exact.base_model.model[0].lora_magnitude_vector["default"].weight
    magnitude.data *= 0.5 + torch.rand(80).to(magnitude.dtype)
    model, plain = copy.deepcopy(exact), copy.deepcopy(exact)
    exact.double()
    accelerate(model)
    x, dy = torch.randn(90, 64).to(dtype), torch.randn(90, 80).to(dtype)
    names = ("y", "dx", "magnitude", "lora_A", "lora_B")
    found = []
    for each in (model, plain, exact):
        wide = torch.float64 if each is exact else dtype
        inputs = x.to(wide).requires_grad_()
        y = each(inputs)
        trained = {n: p for n, p in each.named_parameters() if p.requires_grad}
        order = [inputs, *(next(p for n, p in trained.items() if k in n) for k in names[2:])]
        gradients = torch.autograd.grad(y, order, dy.to(y.dtype))
        found.append(dict(zip(names, (y.detach(), *gradients), strict=True)))
    # Beside wider adapters the low-rank part is computed in the layer's dtype, in peft in theirs.
    judged = names[:2] if adapters and dtype != torch.float32 else names
    for name in judged:
        assert_as_accurate_as_eager(name, found[0][name], [found[1][name]], found[2][name], dtype)


def test_dropout_of_dora_has_pefts_mean_and_spread() -> None:
    """Masks differ by design. In evaluation there are none."""
    config = lora_config(use_dora=True, lora_dropout=0.3, target_modules=["0"])
    torch.manual_seed(0)
    model, plain = _trained(config, nn.Sequential(nn.Linear(24, 16)))
    accelerate(model)
    x = torch.randn(1, 24).expand(20000, 24)
    torch.testing.assert_close(model.eval()(x[:5]), plain.eval()(x[:5]))
    found, expected = (each.train()(x).detach() for each in (model, plain))
    spread = expected.std(0)
    assert (spread > 0).all()
    # The standard error of a mean of 20000 is spread / 141, that of a spread about spread / 200.
    assert ((found.mean(0) - expected.mean(0)).abs() < 4 * 1.5 * spread / 141).all()
    assert ((found.std(0) - spread).abs() < 4 * 1.5 * spread / 200).all()
    # Base, low-rank part and magnitude all see the same mask: columns vary together as in peft.
    torch.testing.assert_close(
        torch.corrcoef(found.t()), torch.corrcoef(expected.t()), rtol=0.0, atol=0.05
    )


def test_a_layer_in_evaluation_inside_a_training_model_drops_nothing() -> None:
    config = lora_config(use_dora=True, lora_dropout=0.3, target_modules=["0"])
    model, plain = _trained(config, nn.Sequential(nn.Linear(24, 16)))
    accelerate(model)
    for each in (model, plain):
        each.train()
        each.base_model.model[0].training = False
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), plain(x))


def test_merged_unmerged_disabled_and_changed_bases_follow_peft(calls: list[str]) -> None:
    model, plain = _trained(lora_config(use_dora=True))
    accelerate(model)
    ids = tokens()

    def same(fused: bool) -> None:
        calls.clear()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        assert bool(calls) == fused

    with torch.no_grad():
        same(fused=True)
        for each in (model, plain):
            each.merge_adapter()
        same(fused=False)
        for each in (model, plain):
            each.unmerge_adapter()
        same(fused=True)
        with model.disable_adapter(), plain.disable_adapter():
            same(fused=False)
        for each in (model, plain):
            each.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.data *= 3.0
        same(fused=True)
        merged, others = model.merge_and_unload(), plain.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, others(ids).logits, rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_the_way_back() -> None:
    model, plain = _trained(lora_config(use_dora=True, target_modules=["q_proj", *EMBEDDING]))
    # peft's own pickling of a DoRA embedding is not at stake: one layer of each kind is.
    accelerate(model)
    expected = logits_and_gradients(plain)
    assert_same(logits_and_gradients(copy.deepcopy(model)), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(logits_and_gradients(torch.load(buffer, weights_only=False)), expected)
    assert len(unaccelerate(model)) == 2
    assert_same(logits_and_gradients(model), expected)


def test_several_adapters(calls: list[str]) -> None:
    """DoRA first and plain LoRA after it is fused; a DoRA that follows acts on a sum."""
    model = built(lora_config(use_dora=True, target_modules=["q_proj"]))
    model.add_adapter("second", lora_config(r=3, target_modules=["q_proj"]))
    model.add_adapter("third", lora_config(r=2, target_modules=["q_proj"], use_dora=True))
    plain = copy.deepcopy(model)
    accelerate(model)
    for names, fused in (
        (["default"], "dora_linear"),
        (["second"], "lora_linear"),
        (["default", "second"], "dora_linear"),
        (["second", "third"], None),
        (["default", "third"], None),
    ):
        for each in (model, plain):
            each.base_model.set_adapter(names)
        calls.clear()
        assert_same(logits_and_gradients(model), logits_and_gradients(plain))
        assert calls == ([fused] * 2 if fused else [])


def test_fifty_steps_of_training_give_the_same_losses() -> None:
    config = lora_config(use_dora=True, target_modules=["q_proj", "down_proj"])
    losses = []
    for model, fused in zip(pair(config), (True, False), strict=True):
        if fused:
            accelerate(model)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses.append([])
        for _ in range(50):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < losses[1][0] - 0.1
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_embeddings_give_the_same_logits_and_gradients(calls: list[str]) -> None:
    config = lora_config(target_modules=[*EMBEDDING, "q_proj"], lora_dropout=0.0)
    model, plain = pair(config)
    report = accelerate(model, strict=True)
    assert dict(report.accelerated)[report.accelerated[0][0]] == "lora_embedding"
    padded = tokens()
    padded[0, :3] = 0  # the padding row of the table
    found = logits_and_gradients(model, input_ids=padded)
    assert_same(found, logits_and_gradients(plain, input_ids=padded))
    (gradient,) = (value for name, value in found.items() if "lora_embedding_A" in name)
    assert gradient.any() and not gradient[:, 0].any()
    assert calls.count("lora_embedding") == 1


def test_several_adapters_of_an_embedding(calls: list[str]) -> None:
    model = built(lora_config(target_modules=EMBEDDING))
    model.add_adapter("second", lora_config(r=3, target_modules=EMBEDDING))
    plain = copy.deepcopy(model)
    accelerate(model)
    for names in (["default"], ["second"], ["default", "second"]):
        for each in (model, plain):
            each.base_model.set_adapter(names)
        assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert calls == ["lora_embedding"] * 3


def test_merged_embeddings_and_mixed_batches_run_pefts_forward(calls: list[str]) -> None:
    model = built(lora_config(target_modules=EMBEDDING))
    model.add_adapter("second", lora_config(r=3, target_modules=EMBEDDING))
    plain = copy.deepcopy(model)
    accelerate(model)
    ids = tokens()
    with torch.no_grad():
        names = ["second", "default"]
        torch.testing.assert_close(
            model.eval()(ids, adapter_names=names).logits,
            plain.eval()(ids, adapter_names=names).logits,
        )
        for each in (model, plain):
            each.merge_adapter()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        assert not calls
        for each in (model, plain):
            each.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        assert calls == ["lora_embedding"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tying", [False, True], ids=["apart", "ensure_weight_tying"])
def test_tied_embedding_and_head(tying: bool, calls: list[str]) -> None:
    config = lora_config(
        target_modules=[*EMBEDDING, "lm_head", "q_proj"], ensure_weight_tying=tying
    )
    # Built twice: peft's tied adapters cannot be copied.
    model, plain = (built(config, llama(tie_word_embeddings=True)) for _ in range(2))
    report = accelerate(model, strict=True)
    assert {name.rsplit(".")[-1]: op for name, op in report.accelerated} == {
        "embed_tokens": "lora_embedding", "q_proj": "lora_linear", "lm_head": "lora_linear",
    }  # fmt: skip
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert calls == ["lora_embedding", "lora_linear", "lora_linear", "lora_linear"]
    head, table = (
        model.base_model.model.lm_head.base_layer.weight,
        model.base_model.model.model.embed_tokens.base_layer.weight,
    )
    assert head is table


class Scaled(nn.Embedding):
    """As Gemma's: its rows are scaled."""

    embed_scale = torch.tensor(3.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


REFUSED: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "scaled": (Scaled(20, 8), {}, "base layer is a .*Scaled"),
    "renormalised": (nn.Embedding(20, 8, max_norm=1.0), {}, "max_norm"),
    "counted": (nn.Embedding(20, 8, scale_grad_by_freq=True), {}, "scale_grad_by_freq"),
    "sparse": (nn.Embedding(20, 8, sparse=True), {}, "sparse"),
    "dora": (nn.Embedding(20, 8), {"use_dora": True}, "DoraEmbeddingVariant"),
}


@pytest.mark.parametrize(("base", "options", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_the_function_cannot_take_runs_pefts_own_forward(
    base: nn.Module, options: dict[str, Any], reason: str, calls: list[str]
) -> None:
    config = lora_config(target_modules=["0", "1"], **options)
    model, plain = pair(config, nn.Sequential(base, nn.Linear(8, 8)))
    report = accelerate(model)
    ((_, given),) = report.skipped
    assert re.search(reason, given)
    # Even where the class is forced on it.
    model.base_model.model[0].__class__ = peft_embedding.FusedEmbedding
    ids = torch.tensor([[1, 2, 2, 7]])
    found = []
    for each in (model, plain):
        y = each(ids)
        # peft's own backward fails where the gradients of the table are sparse.
        if not getattr(base, "sparse", False):
            y.square().mean().backward()
        gradients = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        found.append({"base_model y": y.detach()} | gradients)
    assert_same(*found)
    assert "lora_embedding" not in calls


def test_a_hooked_magnitude_is_called(calls: list[str]) -> None:
    """FSDP and offloading wait in hooks: a weight must not be read behind them."""
    model, plain = _trained(lora_config(use_dora=True, target_modules=["q_proj"]))
    accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen: list[int] = []
    layer.lora_magnitude_vector["default"].register_forward_pre_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)
    assert seen == [1] and calls == ["dora_linear"]


def test_a_variant_that_is_not_exactly_dora_is_skipped() -> None:
    model = built(lora_config(target_modules=["q_proj"]))
    model.add_adapter("other", lora_config(target_modules=["v_proj"], use_dora=True))

    class Changed(peft_lora.DoraLinearVariant):
        """Computes something else."""

    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_variant["default"] = Changed()
    report = accelerate(model)
    assert [reason for _, reason in report.skipped] == ["adapter 'default' is a Changed"]
