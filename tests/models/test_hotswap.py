"""``accelerate`` beside peft's hotswapping, which makes scalings tensors; other odd scalings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

from peft_kernels import accelerate
from tests.models.peft_models import (
    assert_same,
    llama,
    logits_and_gradients,
    lora_config,
    pair,
    tokens,
)

pytestmark = pytest.mark.external


def _saved(folder: Path, **options: Any) -> str:
    """Write an adapter of another rank, alpha and values; return the folder."""
    torch.manual_seed(9)
    other = PeftModel(llama(), lora_config(r=3, lora_alpha=21, **options))
    other.save_pretrained(folder)
    return str(folder)


def test_swapped_adapters_of_another_rank(tmp_path: Path, fused_calls: list[float]) -> None:
    folder = _saved(tmp_path)
    model, plain = pair(lora_config())
    for each in (model, plain):
        prepare_model_for_compiled_hotswap(each, target_rank=8)
    report = accelerate(model, strict=True)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == len(report.accelerated) == 14
    before = logits_and_gradients(plain)["logits"]
    for each in (model, plain):
        hotswap_adapter(each, folder, "default")
    expected = logits_and_gradients(plain)
    assert not torch.allclose(expected["logits"], before)
    assert_same(logits_and_gradients(model), expected)
    assert len(fused_calls) == 2 * 14


def test_embeddings_read_a_tensor_for_a_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair(lora_config(target_modules=["embed_tokens"]))
    accelerate(model)
    for each in (model, plain):
        each.base_model.model.model.embed_tokens.scaling["default"] = torch.tensor(0.7)
    monkeypatch.delattr(lora.Embedding, "forward")  # the kernel is to serve it
    actual = logits_and_gradients(model)
    monkeypatch.undo()
    assert_same(actual, logits_and_gradients(plain))


def test_a_compiled_model_is_swapped_without_compiling_again(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    model, plain = pair(lora_config())
    for each in (model, plain):
        prepare_model_for_compiled_hotswap(each, target_rank=8)
    accelerate(model)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(tokens()).logits, plain(tokens()).logits)
    for each in (model, plain):
        hotswap_adapter(each, folder, "default")
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = whole(tokens()).logits
    torch.testing.assert_close(actual, plain(tokens()).logits)


def test_projections_with_tensors_for_scalings_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, fused_calls: list[float]
) -> None:
    monkeypatch.setattr("peft_kernels.core.projections_tiles.serves", lambda device: True)
    model, plain = pair(lora_config())
    for each in (model, plain):
        prepare_model_for_compiled_hotswap(each, target_rank=8)
    accelerate(model)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert len(fused_calls) == 14


@pytest.mark.parametrize(
    "scaling",
    [
        torch.tensor(2.0, dtype=torch.float64),
        nn.Parameter(torch.tensor(2.0)),
        torch.tensor(2.0).numpy()[()],  # numpy's float32 is no float
        float("inf"),
    ],
    ids=["float64", "trained", "numpy", "inf"],
)
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_scalings_that_no_kernel_takes_run_pefts_forward(
    scaling: Any, target: str, fused_calls: list[float]
) -> None:
    model, plain = pair(lora_config(target_modules=[target]))
    accelerate(model)
    layers = []
    for each in (model, plain):
        own = copy.deepcopy(scaling)
        for module in each.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] = own
        layers.append(own)
    expected = plain(tokens()).logits
    assert torch.equal(torch.nan_to_num(model(tokens()).logits), torch.nan_to_num(expected))
    assert not fused_calls
    with pytest.raises(ValueError, match="'default' has the scaling"):
        accelerate(model)
    if isinstance(scaling, nn.Parameter):
        for each, own in zip((model, plain), layers, strict=True):
            each(tokens()).logits.square().sum().backward()
            assert own.grad is not None and own.grad != 0


def test_dora_with_a_tensor_for_a_scaling_runs_pefts_forward() -> None:
    model, plain = pair(lora_config(use_dora=True, target_modules=["q_proj"]))
    accelerate(model)
    for each in (model, plain):
        for module in each.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] = torch.tensor(0.7)
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_dropout_of_one_leaves_the_base_layer(use_dora: bool, fused_calls: list[float]) -> None:
    config = lora_config(lora_dropout=1.0, use_dora=use_dora, target_modules=["q_proj"])
    model, plain = pair(config)
    accelerate(model)
    actual, expected = logits_and_gradients(model), logits_and_gradients(plain)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    assert not fused_calls
    torch.testing.assert_close(model.eval()(tokens()).logits, plain.eval()(tokens()).logits)
    assert use_dora or len(fused_calls) == 2
