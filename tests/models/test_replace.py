"""Swapping layers by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_kernels import LoRALinear, replace


def _model() -> nn.Module:
    return nn.ModuleDict(
        {
            "block": nn.ModuleDict({"q_proj": nn.Linear(8, 8), "my_q_proj": nn.Linear(8, 8)}),
            "other": nn.ModuleDict({"q_proj": nn.Linear(8, 8), "out": nn.Linear(8, 4)}),
        }
    )


def _lora(linear: nn.Module) -> nn.Module:
    return LoRALinear.from_linear(linear, r=2, lora_alpha=4)  # type: ignore[arg-type]


def test_a_suffix_matches_at_a_dot_and_the_names_come_back() -> None:
    model = _model()
    assert replace(model, "q_proj", _lora) == ["block.q_proj", "other.q_proj"]
    assert isinstance(model["other"]["q_proj"], LoRALinear)
    assert type(model["block"]["my_q_proj"]) is nn.Linear


def test_a_full_name_matches_one_layer() -> None:
    model = _model()
    assert replace(model, ["other.out"], _lora) == ["other.out"]
    assert type(model["other"]["q_proj"]) is nn.Linear


@pytest.mark.parametrize("targets", ["k_proj", ["q_proj", "k_proj"], [], "proj"])
def test_a_target_without_a_match_raises_and_changes_nothing(targets: object) -> None:
    model = _model()
    with pytest.raises(ValueError, match="matched no module.*block.q_proj"):
        replace(model, targets, _lora)  # type: ignore[arg-type]
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_tied_layers_stay_tied() -> None:
    model = _model()
    model["other"]["q_proj"] = model["block"]["q_proj"]
    replace(model, "q_proj", _lora)
    assert model["other"]["q_proj"] is model["block"]["q_proj"]


def test_a_match_inside_a_match_raises() -> None:
    with pytest.raises(ValueError, match="inside"):
        replace(_model(), ["block", "block.q_proj"], _lora)


def test_a_failing_build_changes_nothing() -> None:
    model = _model()
    with pytest.raises(TypeError, match="from_linear"):
        replace(model, ["block.q_proj", "other"], _lora)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        replace(model, "q_proj", lambda old: None)  # type: ignore[arg-type,return-value]
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_the_model_still_computes_what_it_did() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 8)
    before = model(x)
    replace(model, ["0", "2"], _lora)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_encoder_calls_what_was_replaced_in_inference_too(padded: bool) -> None:
    """Its fused path for inference would read the frozen weights and drop the low-rank part."""
    layer = nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    names = replace(encoder, ["linear1", "linear2"], _lora)
    assert len(names) == 4
    for name in names:
        nn.init.normal_(encoder.get_submodule(name).get_parameter("lora_B"))
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with_gradients = encoder(x, src_key_padding_mask=mask)
    with torch.inference_mode():
        without = encoder(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(without[kept], with_gradients[kept])


def test_a_layer_whose_parent_only_reads_its_weight_is_refused() -> None:
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match=r"out_proj.*would be ignored"):
        replace(nn.ModuleDict({"attention": attention}), "out_proj", _lora)
