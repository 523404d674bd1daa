"""``accelerate`` on LoRA models of peft: the same results, the same model afterwards."""

from __future__ import annotations

import copy
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_kernels import (
    AccelerationReport,
    accelerate,
    lora_linear,
    lora_projections,
    unaccelerate,
)
from peft_kernels.models.fused import peft_lora, projections
from tests.models.peft_models import (
    assert_same,
    built,
    llama,
    logits_and_gradients,
    lora_config,
    pair,
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


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows by the dropout of each layer that a kernel computes."""
    calls: list[float] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["dropout_p"])
        return lora_linear(*args, **kwargs)

    def counted_together(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        calls.extend(kwargs["dropout_p"])
        return lora_projections(*args, **kwargs)

    monkeypatch.setattr(peft_lora, "lora_linear", counted)
    monkeypatch.setattr(projections, "lora_projections", counted_together)
    return calls


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


def test_dropout_acts_in_training_alone_and_is_seeded(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(lora_dropout=0.25))
    accelerate(model, strict=True)
    first, again, other = (_seeded(model, seed) for seed in (3, 3, 4))
    assert set(fused_calls) == {0.25}
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.eval(), plain.eval()
    torch.testing.assert_close(_seeded(model, 3), _seeded(plain, 3), rtol=2e-5, atol=2e-6)


def _seeded(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(tokens()).logits


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


def test_adapters_are_loaded_switched_added_and_deleted(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config())
    accelerate(model)
    for each in (model, plain):
        torch.manual_seed(5)
        each.add_adapter("other", lora_config(r=3, target_modules=["q_proj", "o_proj"]))
        each.set_adapter("other")
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == 4
    for each in (model, plain):
        each.set_adapter("default")
        each.delete_adapter("other")
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == 4 + 14


def test_several_active_adapters_add_up(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(target_modules=["q_proj"]))
    accelerate(model)
    for each in (model, plain):
        torch.manual_seed(5)
        each.add_adapter("other", lora_config(r=3, target_modules=["q_proj"]))
        each.base_model.set_adapter(["default", "other"])
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == 2


def test_disabled_merged_and_mixed_batches_run_pefts_forward(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config())
    accelerate(model)
    model.eval(), plain.eval()
    ids = tokens()
    with torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(ids).logits, plain(ids).logits)
        for each in (model, plain):
            torch.manual_seed(5)
            each.add_adapter("other", lora_config(r=3))
        names = ["other", "__base__"]
        mixed = [each(ids, adapter_names=names).logits for each in (model, plain)]
        assert torch.equal(*mixed)
        model.merge_adapter(), plain.merge_adapter()
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert not fused_calls
        model.unmerge_adapter(), plain.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=2e-5, atol=2e-6)
        assert len(fused_calls) == 14
        merged = model.merge_and_unload(), plain.merge_and_unload()
        assert torch.equal(merged[0](ids).logits, merged[1](ids).logits)
    assert not any(isinstance(each, peft_lora.FusedLinear) for each in merged[0].modules())


def test_saved_and_loaded_as_pefts(tmp_path: Path) -> None:
    model = built(lora_config(modules_to_save=["lm_head"]))
    accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    expected = _seeded(loaded, 0)
    torch.testing.assert_close(_seeded(model, 0), expected, rtol=2e-5, atol=2e-6)
    accelerate(loaded)
    assert torch.equal(_seeded(model, 0), _seeded(loaded, 0))


def test_copies_and_pickles_stay_accelerated() -> None:
    model = built(lora_config())
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(type(each) is peft_lora.FusedLinear for each in other.modules())
        assert torch.equal(_seeded(other, 0), _seeded(model, 0))
        # A copy computes with its own parameters.
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.mul_(2.0 if "lora_" in name else 1.0)
        assert not torch.equal(_seeded(other, 0), _seeded(model, 0))


def test_twice_changes_nothing_and_unaccelerate_undoes_it() -> None:
    model, plain = pair(lora_config())
    report = accelerate(model)
    assert accelerate(model) == report
    assert unaccelerate(model) == [name for name, _ in report.accelerated]
    assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
    assert torch.equal(_seeded(model, 0), _seeded(plain, 0))
    assert unaccelerate(model) == []
    assert accelerate(model) == report


def test_report_names_what_is_skipped_and_strict_raises(fused_calls: list[float]) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
    classes = [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match="strict=True.*\n.*model.1: no kernel for .*Conv1d"):
        accelerate(model, strict=True)
    assert [type(each) for each in model.modules()] == classes
    report = accelerate(model)
    assert report == AccelerationReport(
        (("base_model.model.0", "lora_linear"),),
        (("base_model.model.1", "no kernel for peft.tuners.lora.layer.Conv1d"),),
    )
    assert str(report) == (
        "accelerated 1 of 2 layers (lora_linear)\n"
        "  skipped base_model.model.1: no kernel for peft.tuners.lora.layer.Conv1d"
    )


def test_hooked_modules_are_called(fused_calls: list[float]) -> None:
    """Offloading, FSDP around a factor, ZeRO: hooks that bring a weight must run."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model, plain = pair(config, nn.Sequential(nn.Linear(8, 8)))
    accelerate(model)
    layer = model.base_model.model[0]
    x = torch.randn(3, 8)
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        seen: list[object] = []
        handle = module.register_forward_pre_hook(lambda *given, seen=seen: seen.append(given))
        assert torch.equal(model(x), plain(x))
        assert len(seen) == 1 and not fused_calls
        handle.remove()
    torch.testing.assert_close(model(x), plain(x))
    assert len(fused_calls) == 1


def test_offloaded_base_is_skipped() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(target_modules=["0", "1"])
    )
    base = model.base_model.model[0].base_layer
    add_hook_to_module(base, ModelHook())
    report = accelerate(model)
    assert [name for name, _ in report.accelerated] == ["base_model.model.1"]
    assert "offloading" in report.skipped[0][1]
    remove_hook_from_module(base)
    assert not accelerate(model).skipped


class Quantised(nn.Linear):
    """Stands for what keeps its weight in another form, as bitsandbytes does."""


def test_a_base_of_another_class_is_skipped_and_called(fused_calls: list[float]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Quantised(8, 8), nn.Linear(8, 8))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model, plain = pair(config, base)
    report = accelerate(model)
    (skipped,) = report.skipped
    assert skipped[0] == "base_model.model.0" and skipped[1].endswith("test_accelerate.Quantised")
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), plain(x))
    assert len(fused_calls) == 1


def test_a_layer_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": nn.Sequential(layer), "second": nn.Sequential(layer)})
    tuned = get_peft_model(model, LoraConfig(target_modules=["first.0"], init_lora_weights=False))
    inner = tuned.base_model.model
    inner["second"][0] = inner["first"][0]
    report = accelerate(tuned)
    assert [name.rpartition("model.")[2] for name, _ in report.accelerated] == [
        "first.0", "second.0",
    ]  # fmt: skip
    assert len(unaccelerate(tuned)) == 1


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


def test_narrower_adapters_run_pefts_forward(fused_calls: list[float]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model, plain = pair(config, nn.Sequential(nn.Linear(8, 8)))
    for each in (model, plain):
        each.base_model.model[0].lora_A.to(torch.bfloat16)
        each.base_model.model[0].lora_B.to(torch.bfloat16)
    accelerate(model)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), plain(x)) and not fused_calls


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


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_fifty_steps_train_alike(kind: str, fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(r=8, init_lora_weights=True))
    accelerate(model)
    losses = [_train(each, kind, 50) for each in (model, plain)]
    assert len(fused_calls) == 50 * 14
    assert losses[0][-1] < losses[0][0] - 0.05
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0.0)


def _train(model: nn.Module, kind: str, steps: int) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(trained, lr=0.5) if kind == "sgd" else torch.optim.AdamW(trained, lr=5e-3)
    )
    ids, losses = tokens(4, 16), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        accelerate("llama")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got NoneType"):
        unaccelerate(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model has no adapter layer"):
        accelerate(llama())
    with pytest.raises(ValueError, match="(?s)no adapter layer .* can be accelerated.*ia3"):
        accelerate(get_peft_model(nn.Sequential(nn.Linear(4, 4)), _ia3()))
    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"meta device \(base_model.model.0.base_layer.weight\)"):
        accelerate(model)
    monkeypatch.setattr("peft.__version__", "0.17.1")
    with pytest.raises(RuntimeError, match=r"peft 0.17.1 is installed.*'peft>=0.18'"):
        accelerate(built(lora_config()))


def _ia3() -> IA3Config:
    return IA3Config(target_modules=["0"], feedforward_modules=["0"])


def test_an_adapter_on_another_device_is_skipped_by_name() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0", "1"])
    )
    layer = model.base_model.model[0]
    # The machine has one device: the factor only says that it is elsewhere.
    elsewhere = types.SimpleNamespace(weight=types.SimpleNamespace(device=torch.device("cuda:1")))
    del layer.lora_A["default"]
    layer.__dict__["lora_A"] = {"default": elsewhere}
    report = accelerate(model)
    assert report.skipped == (
        ("base_model.model.0", "adapter 'default' is on cuda:1, its layer on cpu"),
    )


def test_variants_of_lora_are_skipped_and_run_as_before(fused_calls: list[float]) -> None:
    base = llama()
    config = lora_config(target_modules=["q_proj"])
    model, plain = pair(config, base)
    accelerate(model)
    for each in (model, plain):
        torch.manual_seed(5)
        each.add_adapter("other", lora_config(target_modules=["q_proj"], init_lora_weights="mica"))
        each.set_adapter("other")
    with pytest.raises(ValueError, match="(?s)can be accelerated.*'other' is a MiCALinearVariant"):
        accelerate(model)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert not fused_calls
