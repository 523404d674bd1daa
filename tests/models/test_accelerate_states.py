"""``accelerate`` on LoRA models of peft: what a layer does in each state, and what is skipped."""

from __future__ import annotations

import copy
import pickle
import types
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_kernels import (
    AccelerationReport,
    accelerate,
    unaccelerate,
)
from peft_kernels.models.fused import peft_lora
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


def test_disabled_and_merged_layers_run_pefts_forward(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config())
    accelerate(model)
    model.eval(), plain.eval()
    ids = tokens()
    with torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(ids).logits, plain(ids).logits)
        model.merge_adapter(), plain.merge_adapter()
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert not fused_calls
        model.unmerge_adapter(), plain.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=2e-5, atol=2e-6)
        assert len(fused_calls) == 14
        merged = model.merge_and_unload(), plain.merge_and_unload()
        assert torch.equal(merged[0](ids).logits, merged[1](ids).logits)
    assert not any(isinstance(each, peft_lora.FusedLinear) for each in merged[0].modules())


def test_rows_of_a_batch_name_their_adapters(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(target_modules=["q_proj", "v_proj"]))
    accelerate(model)
    for each in (model, plain):
        torch.manual_seed(5)
        each.add_adapter("other", lora_config(r=3, target_modules=["q_proj"]))
        each.eval()
    ids = torch.cat([tokens(), tokens()])[:4]
    for names, calls in (
        (["other", "__base__", "default", "other"], 3 * 2),  # v_proj has no "other"
        (["default"] * 4, 2 * 2),
        (["__base__"] * 4, 0),
    ):
        fused_calls.clear()
        found = [each(ids, adapter_names=names).logits for each in (model, plain)]
        torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)
        assert len(fused_calls) == calls
    layer = next(each for each in model.modules() if isinstance(each, peft_lora.FusedLinear))
    assert layer(torch.ones(0, 3, layer.in_features), adapter_names=[]).shape[:2] == (0, 3)
    gradients = []
    for each in (model, plain):
        each(ids, adapter_names=["other", "default", "__base__", "default"]).logits.sum().backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=2e-4, atol=2e-6)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(ids, adapter_names=["default"])


def test_a_mixed_batch_with_hooks_on_a_factor_runs_pefts_forward(fused_calls: list[float]) -> None:
    model, plain = pair(lora_config(target_modules=["q_proj"]))
    accelerate(model)
    for layer in (each for each in model.modules() if isinstance(each, peft_lora.FusedLinear)):
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    names = ["default", "__base__"]
    found = [each.eval()(tokens(), adapter_names=names).logits for each in (model, plain)]
    torch.testing.assert_close(*found)
    assert not fused_calls


def test_saved_and_loaded_as_pefts(tmp_path: Path) -> None:
    model = built(lora_config(modules_to_save=["lm_head"]))
    accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    expected = seeded_logits(loaded, 0)
    torch.testing.assert_close(seeded_logits(model, 0), expected, rtol=2e-5, atol=2e-6)
    accelerate(loaded)
    assert torch.equal(seeded_logits(model, 0), seeded_logits(loaded, 0))


def test_copies_and_pickles_stay_accelerated() -> None:
    model = built(lora_config())
    accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(type(each) is peft_lora.FusedLinear for each in other.modules())
        assert torch.equal(seeded_logits(other, 0), seeded_logits(model, 0))
        # A copy computes with its own parameters.
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.mul_(2.0 if "lora_" in name else 1.0)
        assert not torch.equal(seeded_logits(other, 0), seeded_logits(model, 0))


def test_twice_changes_nothing_and_unaccelerate_undoes_it() -> None:
    model, plain = pair(lora_config())
    report = accelerate(model)
    assert accelerate(model) == report
    assert unaccelerate(model) == [name for name, _ in report.accelerated]
    assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
    assert torch.equal(seeded_logits(model, 0), seeded_logits(plain, 0))
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
    assert skipped[0] == "base_model.model.0" and skipped[1].endswith(".Quantised")
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


def test_a_projection_that_attention_never_calls_is_skipped() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    config = LoraConfig(r=2, target_modules=["attention", "out"], init_lora_weights=False)
    model, plain = pair(config, base)
    report = accelerate(model)
    assert [name for name, _ in report.accelerated] == ["base_model.model.out"]
    reasons = {name.rpartition(".")[2]: reason for name, reason in report.skipped}
    assert "MultiheadAttention reads its weight alone" in reasons["out_proj"]
    x = torch.randn(3, 1, 8)
    actual, expected = (each.base_model.model["attention"](x, x, x)[0] for each in (model, plain))
    assert torch.equal(actual, expected)


def test_nested_tensors_run_pefts_forward(fused_calls: list[float]) -> None:
    model, plain = pair(
        LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False),
        nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)),
    )
    accelerate(model, strict=True)
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    ids = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for actual, expected in zip(model(ids).unbind(), plain(ids).unbind(), strict=True):
        assert torch.equal(actual, expected)
    assert not fused_calls


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
