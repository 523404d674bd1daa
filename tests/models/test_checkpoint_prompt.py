"""Prompts and prefixes in peft's format: written by us and loaded by peft, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor, nn

from peft_kernels import PromptEmbedding, attach_prefixes, load_adapter, save_adapter
from tests.models.peft_models import built, llama, tokens

VIRTUAL = 5


def _logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or {"input_ids": tokens()})).logits


def _prompted(base: nn.Module, layer: PromptEmbedding) -> Tensor:
    with torch.no_grad():
        return _logits(base, inputs_embeds=layer(tokens()).embeddings)


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    plain = _logits(llama())
    assert (expected[:, -plain.shape[1] :] - plain).abs().max() > 1e-3, "nothing was changed"
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


def _layer(base: Any, **options: Any) -> PromptEmbedding:
    given = {"num_virtual_tokens": VIRTUAL, "init": "random"} | options
    return PromptEmbedding.from_embedding(base.get_input_embeddings(), **given)


@pytest.mark.parametrize("projected", [False, True])
def test_prompts_go_to_peft_and_back(projected: bool, tmp_path: Path) -> None:
    base = llama()
    layer = _layer(base, prompt_projection=projected)
    nn.init.normal_(layer.prompt)
    assert save_adapter(layer, tmp_path, task_type="CAUSAL_LM") == [""]
    expected = _prompted(base, layer)
    _assert_same(_logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    other = _layer(base, position="after_padding")
    assert load_adapter(other, tmp_path) == [""]
    _assert_same(_prompted(base, other), expected)
    with pytest.raises(ValueError, match=r"misshapen: prompt_embeddings \[5, 32\], expected \[4"):
        load_adapter(_layer(base, num_virtual_tokens=4), tmp_path)
    with pytest.raises(ValueError, match="has an MLP.*fold"):
        load_adapter(_layer(base, prompt_projection=True), tmp_path)
    with pytest.raises(ValueError, match="the model has 0 PromptEmbedding"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_prompts_come_from_peft(config: Any, tmp_path: Path) -> None:
    theirs = built(config(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    theirs.save_pretrained(tmp_path)
    base = llama()
    layer = _layer(base)
    load_adapter(layer, tmp_path)
    _assert_same(_prompted(base, layer), _logits(theirs))


def _attached(**options: Any) -> Any:
    model = llama()
    given = {"num_virtual_tokens": VIRTUAL, "shift_positions": True} | options
    attach_prefixes(model, **given)
    for name, parameter in model.named_parameters():
        if "prefix" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_go_to_peft_and_back(projected: bool, tmp_path: Path) -> None:
    model = _attached(prefix_projection=projected)
    names = save_adapter(model, tmp_path, task_type="CAUSAL_LM")
    assert names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    expected = _logits(model)
    _assert_same(_logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    for other in (llama(), _attached()):
        assert load_adapter(other, tmp_path) == names
        _assert_same(_logits(other), expected)
    with pytest.raises(ValueError, match=r"misshapen: prompt_embeddings \[5, 64\], expected \[4"):
        load_adapter(_attached(num_virtual_tokens=4), tmp_path)
    with pytest.raises(ValueError, match="have an MLP.*fold"):
        load_adapter(_attached(prefix_projection=True), tmp_path)


@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_come_from_peft(projected: bool, tmp_path: Path) -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, prefix_projection=projected,
        encoder_hidden_size=16,
    )  # fmt: skip
    theirs = built(config)
    theirs.save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    _assert_same(_logits(model), _logits(theirs))


def test_a_prefix_that_does_not_fit_attaches_nothing(tmp_path: Path) -> None:
    save_adapter(_attached(), tmp_path, task_type="CAUSAL_LM")
    model = llama(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"misshapen: prompt_embeddings \[5, 64\], .* \[5, 96"):
        load_adapter(model, tmp_path)
    assert list(model.state_dict()) == list(llama(num_hidden_layers=3).state_dict())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_transformer_submodules": 2}))
    with pytest.raises(ValueError, match="num_transformer_submodules=2"):
        load_adapter(llama(), tmp_path)


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[nn.Module, str]] = [
        (_attached(shift_positions=False), "without shift_positions=True"),
        (_attached(gated=True), "have gates"),
        (_attached(targets="layers.0.self_attn"), r"none in \['model.layers.1.self_attn'\]"),
        (_layer(llama(), position=3), "position=3"),
        (nn.ModuleList([_layer(llama()), _layer(llama())]), "the model has 2 PromptEmbedding"),
        (nn.ModuleList([_layer(llama()), _attached()]), "has a prompt .* and prefixes"),
    ]
    for model, match in cases:
        with pytest.raises(ValueError, match=match):
            save_adapter(model, tmp_path, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="task_type must be given"):
        save_adapter(_attached(), tmp_path)
    assert not list(tmp_path.iterdir())
