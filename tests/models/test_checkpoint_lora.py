"""LoRA adapters in peft's format: written by us and loaded by peft, and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PhiConfig, PhiForCausalLM

from peft_kernels import LoRALinear, add_adapters, load_adapter, save_adapter
from tests.distributed.launch import ROOT, torchrun
from tests.models.peft_models import (
    SETTINGS,
    TENSORS,
    built,
    llama,
    lora_config,
    put_lora,
    tokens,
)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def _assert_same_logits(model: nn.Module, expected: nn.Module) -> None:
    plain = _logits(llama())
    logits = _logits(expected)
    assert (logits - plain).abs().max() > 1e-3, "the adapter changes nothing"
    torch.testing.assert_close(_logits(model), logits, rtol=2e-5, atol=2e-6)


def _mixed(model: nn.Module) -> None:
    put_lora(model, ["q_proj"], lora_dropout=0.1)
    put_lora(model, ["layers.0.mlp.up_proj"], r=7, lora_alpha=3, lora_dropout=0.1)
    put_lora(model, ["layers.1.mlp.up_proj"], r=4, use_rslora=True, lora_dropout=0.1)
    put_lora(model, ["lm_head"], r=3, lora_alpha=2.5, lora_dropout=0.1)


PLACED = {
    "one target": lambda model: put_lora(model, "q_proj"),
    "rslora": lambda model: put_lora(model, ["q_proj", "down_proj"], use_rslora=True),
    "one layer": lambda model: put_lora(model, "model.layers.1.mlp.gate_proj"),
    "layers that differ": _mixed,
}


@pytest.mark.parametrize("place", PLACED.values(), ids=list(PLACED))
def test_peft_loads_what_we_save(place: Any, tmp_path: Path) -> None:
    model = llama()
    place(model)
    names = save_adapter(model, tmp_path, task_type="CAUSAL_LM")
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    _assert_same_logits(loaded, model)
    adapted = {n.removesuffix(".lora_A.default.weight") for n, _ in loaded.named_parameters()}
    assert {f"base_model.model.{name}" for name in names} <= adapted


@pytest.mark.parametrize("place", PLACED.values(), ids=list(PLACED))
@pytest.mark.parametrize("filled", [False, True], ids=["plain", "has the layers"])
def test_we_load_what_we_save(place: Any, filled: bool, tmp_path: Path) -> None:
    model, other = llama(), llama()
    place(model)
    if filled:
        torch.manual_seed(5)
        place(other)
    names = save_adapter(model, tmp_path)
    assert load_adapter(other, tmp_path) == names
    _assert_same_logits(other, model)
    for name in names:
        ours, theirs = (each.get_submodule(name) for each in (other, model))
        assert ours.extra_repr().split(", r=")[0] == theirs.extra_repr().split(", r=")[0]
        assert ours.scaling == pytest.approx(theirs.scaling, rel=1e-15)
        assert ours.lora_dropout == theirs.lora_dropout


OF_PEFT: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "names": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "a regex": {"target_modules": r".*\.(0|1)\.mlp\.(up|down)_proj"},
    "excluded": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"q_proj": 7, r"layers.1.self_attn.(k|v)_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 32},
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "some layers, by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "a whole name is of any layer": {
        "target_modules": ["q_proj", "lm_head"],
        "layers_to_transform": [1],
    },
}


@pytest.mark.parametrize("options", OF_PEFT.values(), ids=list(OF_PEFT))
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_we_load_what_peft_saves(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = built(lora_config(**options))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = llama()
    names = load_adapter(model, tmp_path)
    _assert_same_logits(model, theirs)
    assert len(names) == sum("lora_A" in name for name, _ in theirs.named_parameters())
    again = tmp_path / "again"
    save_adapter(model, again)
    _assert_same_logits(PeftModel.from_pretrained(llama(), again), theirs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tied")
def test_embeddings_that_peft_saves_beside_the_factors_are_taken(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    """By itself it saves the head where that is a target; both, if asked for, where none is."""
    theirs = built(lora_config(target_modules=targets), llama(tie_word_embeddings=tied))
    head = theirs.get_output_embeddings()
    with torch.no_grad():
        getattr(head, "base_layer", head).weight.mul_(3.0)
        if "lm_head" not in targets:
            theirs.get_input_embeddings().weight.add_(1.0)
    theirs.save_pretrained(tmp_path, save_embedding_layers="lm_head" not in targets or "auto")
    model = llama(tie_word_embeddings=tied)
    for _ in range(2):  # into plain layers, then into LoRALinear
        load_adapter(model, tmp_path)
        _assert_same_logits(model, theirs)
    again = tmp_path / "again"  # what came with the adapter goes with it
    save_adapter(model, again)
    assert load_file(again / TENSORS).keys() == load_file(tmp_path / TENSORS).keys()
    _assert_same_logits(PeftModel.from_pretrained(llama(tie_word_embeddings=tied), again), theirs)
    narrower = llama(tie_word_embeddings=tied, vocab_size=31)
    before = {name: t.clone() for name, t in narrower.state_dict().items()}
    with pytest.raises(ValueError, match=r"misshapen: .*lm_head.*weight"):
        load_adapter(narrower, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in narrower.state_dict().items())


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_bias_of_a_head_comes_along(targets: list[str], tmp_path: Path) -> None:
    def phi() -> PhiForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        return PhiForCausalLM(PhiConfig(vocab_size=96, num_attention_heads=4, **sizes))

    theirs = built(lora_config(target_modules=targets), phi())
    head = theirs.get_output_embeddings()
    nn.init.normal_(getattr(head, "base_layer", head).bias)
    theirs.save_pretrained(tmp_path, save_embedding_layers="lm_head" not in targets or "auto")
    model = phi()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(_logits(model), _logits(theirs), rtol=2e-5, atol=2e-6)
    save_adapter(model, tmp_path / "again")
    loaded = PeftModel.from_pretrained(phi(), tmp_path / "again")
    torch.testing.assert_close(_logits(loaded), _logits(theirs), rtol=2e-5, atol=2e-6)


WRAPPERS = {"compiled": torch.compile, "checkpointed": checkpoint_wrapper}


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_head_in_a_wrapper_takes_its_weight(
    wrap: Any, targets: list[str], tmp_path: Path
) -> None:
    theirs = built(lora_config(target_modules=targets))
    with torch.no_grad():
        head = theirs.get_output_embeddings()
        getattr(head, "base_layer", head).weight.mul_(3.0)
    theirs.save_pretrained(tmp_path, save_embedding_layers="lm_head" not in targets or "auto")
    model = llama()
    model.lm_head = wrap(model.lm_head)
    load_adapter(model, tmp_path)
    plain = llama()
    load_adapter(plain, tmp_path)
    _assert_same_logits(plain, theirs)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_a_model_need_not_have_embeddings(tmp_path: Path) -> None:
    model = llama()
    names = put_lora(model, ["q_proj"])
    save_adapter(model, tmp_path)
    other = llama()

    def none() -> nn.Module:
        raise NotImplementedError

    other.get_input_embeddings = other.get_output_embeddings = none
    assert load_adapter(other, tmp_path) == names


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """A list of names would reach "block.0" by "0"."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))

    model = make()
    layer = LoRALinear.from_linear(model[0], r=2, lora_alpha=2)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    model[0] = layer
    save_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    other = make()
    assert load_adapter(other, tmp_path) == ["0"]
    torch.testing.assert_close(other(x), model(x))


def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path) -> None:
    model = llama()
    names = put_lora(model, "q_proj")
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert save_adapter(torch.compile(model), tmp_path) == names
    assert set(load_file(tmp_path / TENSORS)) == {
        f"base_model.model.{name}.lora_{k}.weight" for name in names for k in "AB"
    }
    other = torch.compile(llama())
    add_adapters(other, "layers.1.self_attn.q_proj")
    assert load_adapter(other, tmp_path) == names
    assert isinstance(other.model.layers[0].self_attn.q_proj, LoRALinear)
    assert isinstance(other.model.layers[1].self_attn.q_proj.module, LoRALinear)


def test_dtypes_are_kept_and_widened_to_the_layer(tmp_path: Path) -> None:
    model = llama().bfloat16()
    put_lora(model, "q_proj", dtype=torch.float32)
    save_adapter(model, tmp_path)
    for base, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        other = llama().to(base)
        load_adapter(other, tmp_path)
        layer = other.model.layers[0].self_attn.q_proj
        assert layer.lora_A.dtype == layer.lora_B.dtype == expected
        assert torch.equal(layer.lora_A, model.model.layers[0].self_attn.q_proj.lora_A.to(expected))
        assert layer.lora_A.requires_grad and not layer.weight.requires_grad


def test_a_shared_layer_is_loaded_under_its_first_name_as_peft_does(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = llama()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    theirs = built(lora_config(target_modules=["up_proj"]), tied())
    theirs.save_pretrained(tmp_path)
    model = tied()
    assert load_adapter(model, tmp_path) == ["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(_logits(model), _logits(theirs), rtol=2e-5, atol=2e-6)


def test_the_base_model_is_named(tmp_path: Path) -> None:
    model = llama()
    put_lora(model, "q_proj")
    model.config._name_or_path = "someone/model"
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / SETTINGS).read_text())["base_model_name_or_path"] == (
        "someone/model"
    )


_SHARDED = """
import gc
import sys
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from peft_kernels import LoRALinear, replace, save_adapter

distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
replace(model, ["0", "1"], lambda old: LoRALinear.from_linear(old, r=3, lora_alpha=6))
for layer in model:
    nn.init.normal_(layer.lora_B)
whole = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
if distributed.get_rank() == 0:
    torch.save(whole, sys.argv[2])
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
fully_shard(model, mesh=mesh)
assert model[0].lora_A.to_local().shape != model[0].lora_A.shape
save_adapter(model, sys.argv[1])
distributed.barrier()
# What holds the group keeps its threads alive, which must not free a tensor while Python ends.
del model, layer
gc.collect()
vars(mesh).clear()
distributed.destroy_process_group()
"""


def test_shards_of_two_processes_become_one_file(tmp_path: Path) -> None:
    script, folder, whole = tmp_path / "script.py", tmp_path / "adapter", tmp_path / "whole"
    script.write_text(_SHARDED)
    threads = str(ROOT / "tests/distributed/threads.py")
    done = torchrun(2, threads, str(script), str(folder), str(whole), timeout_s=240)
    assert done.returncode == 0, done.stderr
    expected = {
        f"base_model.model.{name}.weight": value
        for name, value in torch.load(whole, weights_only=True).items()
    }
    saved = load_file(folder / TENSORS)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    assert sorted(os.listdir(folder)) == [SETTINGS, TENSORS]
