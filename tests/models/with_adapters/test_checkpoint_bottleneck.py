"""Bottlenecks in adapters' format: written by us and loaded by adapters, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

adapters = pytest.importorskip(
    "adapters", reason="needs adapters, which excludes this transformers: make test-adapters"
)

from adapters import BnConfig  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_kernels import LoRALinear, add_adapters, load_adapter, replace, save_adapter  # noqa: E402

SETTINGS, TENSORS = "adapter_config.json", "adapter.safetensors"

pytestmark = pytest.mark.external


def _plain(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    classes = {"bert": BertModel, "bert with a head": BertForSequenceClassification}
    model = classes[kind](BertConfig(**sizes))
    if kind == "bert with a head":
        nn.init.normal_(model.classifier.weight)
    return model


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 23).view(2, 11))[0]


def _assert_same(model: Any, expected: Any, kind: str) -> None:
    output = _output(expected)
    assert (output - _output(_plain(kind))).abs().max() > 1e-3, "the adapter changes nothing"
    torch.testing.assert_close(_output(model), output, rtol=2e-5, atol=5e-6)


def _perturbed(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".adapter." in name or ".adapters." in name:
            nn.init.normal_(parameter, std=0.2)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"reduction_factor": 4},
    "learned": {"scale": "learned", "activation": "gelu", "bottleneck": 7},
    "channel": {"scale": "channel", "activation": "silu", "bottleneck": 1},
    "norms": {"layer_norm_before": True, "layer_norm_after": True, "scale": 2.5, "bottleneck": 13},
    "leaky": {"activation": "leaky_relu", "bottleneck": 47},
}


def _adapted(kind: str, options: dict[str, Any]) -> Any:
    model = _plain(kind)
    targets = {"llama": ["o_proj", "down_proj"]}.get(
        kind, ["attention.output.dropout", "0.output.dropout", "1.output.dropout"]
    )
    add_adapters(model, targets, d_model=48, **options)
    _perturbed(model)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", ["bert", "bert with a head", "llama"])
def test_adapters_loads_what_we_save_and_so_do_we(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = _adapted(kind, options)
    names = save_adapter(model, tmp_path)
    assert len(names) == 4
    theirs = _plain(kind)
    adapters.init(theirs)
    name = theirs.load_adapter(str(tmp_path), set_active=True, use_safetensors=True)
    _assert_same(theirs, model, kind)
    ours = _plain(kind)
    assert set(load_adapter(ours, tmp_path)) == set(names)
    _assert_same(ours, model, kind)
    # Into a model that has the layers, and what adapters saves again is what we saved.
    other = _adapted(kind, options)
    load_adapter(other, tmp_path)
    _assert_same(other, model, kind)
    if not options.get("layer_norm_before"):  # adapters itself cannot save those as safetensors
        again = tmp_path / "again"
        theirs.save_adapter(str(again), name, use_safetensors=True)
        expected = load_file(tmp_path / TENSORS)
        saved = load_file(again / TENSORS)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["bert", "bert with a head", "llama"])
def test_we_load_what_adapters_saves(kind: str, tmp_path: Path) -> None:
    theirs = _plain(kind)
    adapters.init(theirs)
    config = BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=5,
                      non_linearity="gelu_new", leave_out=[0], scaling="learned")  # fmt: skip
    theirs.add_adapter("mine", config=config, set_active=True)
    _perturbed(theirs)
    theirs.save_adapter(str(tmp_path), "mine", use_safetensors=True)
    model = _plain(kind)
    names = load_adapter(model, tmp_path)
    assert len(names) == 2 and all("1" in name for name in names)
    _assert_same(model, theirs, kind)
    save_adapter(model, tmp_path / "again")
    settings = json.loads((tmp_path / "again" / SETTINGS).read_text())
    assert settings["config"]["leave_out"] == [0]
    # An adapter of the model without the head fits into the model with it, and the other way.
    if kind.startswith("bert"):
        other = {"bert": "bert with a head", "bert with a head": "bert"}[kind]
        fitting = _plain(other)
        load_adapter(fitting, tmp_path)
        hidden = getattr(fitting, "bert", fitting)
        encoder = getattr(theirs, "bert", theirs)
        hidden.load_state_dict(
            {k: v for k, v in encoder.state_dict().items() if ".adapters." not in k}, strict=False
        )
        torch.testing.assert_close(_output(hidden), _output(encoder), rtol=2e-5, atol=5e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seq_bn of adapters": ({"original_ln_before": True}, "original_ln_before=True"),
    "two": ({"use_gating": True, "phm_layer": True}, "phm_layer=True, use_gating=True"),
    "method": ({"architecture": "lora"}, "architecture='lora'"),
    "parallel": ({"is_parallel": True}, "is_parallel=True"),
    "non-linearity": ({"non_linearity": "prelu"}, "non_linearity='prelu'"),
    "by layer": ({"reduction_factor": {"0": 2}}, "reduction_factor={'0': 2}"),
    "other width": ({"reduction_factor": 2}, "misshapen"),
    "nothing": ({"mh_adapter": False, "output_adapter": False}, "names no layer"),
    "one kind": ({"mh_adapter": False}, "surplus.*attention"),
}


@pytest.mark.parametrize("changes,match", REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_fit_is_refused_by_name(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    save_adapter(_adapted("bert", {}), tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    settings["config"] |= changes
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    model = _plain("bert")
    before = model.state_dict()
    with pytest.raises(ValueError, match=f"(?s){match}"):
        load_adapter(model, tmp_path)
    assert list(model.state_dict()) == list(before)


def test_tensors_are_listed_and_pickles_are_not_loaded(tmp_path: Path) -> None:
    save_adapter(_adapted("llama", {}), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    stem = "model.layers.0.output_adapters.adapters.default"
    del tensors[f"{stem}.adapter_up.bias"]
    tensors[f"{stem}.gate.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=r"(?s)missing: \S+adapter_up.bias \[48\].*surplus.*gate"):
        load_adapter(_plain("llama"), tmp_path)
    (tmp_path / TENSORS).unlink()
    torch.save({}, tmp_path / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"pickle, pytorch_adapter.bin"):
        load_adapter(_plain("llama"), tmp_path)


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"parallel": True}, "mlp", "parallel adapter"),
        ({"bias": False}, "mlp", "without biases"),
        ({}, "lm_head", "no layer for an adapter on 'lm_head'"),
        ({}, ["layers.0.mlp", "layers.1.self_attn"], "is missing in layer"),
        ({}, ["layers.0.mlp", "layers.0.mlp.down_proj"], "are one in adapters"),
    ]
    for options, targets, match in cases:
        model = _plain("llama")
        for target in [targets] if isinstance(targets, str) else reversed(targets):
            width = 50 if target == "lm_head" else 48
            add_adapters(model, target, d_model=width, **options)
        with pytest.raises(ValueError, match=match):
            save_adapter(model, tmp_path)
    model = _adapted("llama", {})
    model.model.layers[0].mlp.down_proj.adapter.activation = "gelu"
    with pytest.raises(ValueError, match="one non_linearity for all layers"):
        save_adapter(model, tmp_path)
    replace(model, "q_proj", lambda old: LoRALinear.from_linear(old, r=2, lora_alpha=2))
    with pytest.raises(ValueError, match="no format has more than one kind"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
