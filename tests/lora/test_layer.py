"""``LoRALinear`` as a drop-in for ``nn.Linear``."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from peft_kernels import LoRALinear


def _trained(dtype: torch.dtype = torch.float32, **options: object) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(24, 16, r=4, lora_alpha=8, dtype=dtype, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


def test_starts_as_the_base_layer_with_only_the_adapter_trained() -> None:
    linear = nn.Linear(24, 16)
    layer = LoRALinear.from_linear(linear, r=4, lora_alpha=8)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A", "lora_B"]


def test_state_dict_has_the_documented_keys_and_loads() -> None:
    layer, other = _trained(), LoRALinear(24, 16, r=4, lora_alpha=8)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), other(x))
    assert list(LoRALinear(4, 4, r=1, lora_alpha=1, bias=False).state_dict()) == [
        "weight", "lora_A", "lora_B",
    ]  # fmt: skip


def test_initialisation_is_the_papers() -> None:
    layer = LoRALinear(400, 16, r=8, lora_alpha=8)
    assert layer.lora_B.count_nonzero() == 0
    bound = math.sqrt(6 / ((1 + 5) * 400))
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_scaling(rslora: bool, scaling: float) -> None:
    assert LoRALinear(8, 8, r=4, lora_alpha=8, use_rslora=rslora).scaling == scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_keeps_the_output_and_unmerging_restores_the_weight(dtype: torch.dtype) -> None:
    layer = _trained(dtype).eval()
    before, x = layer.weight.clone(), torch.randn(5, 24, dtype=dtype)
    y = layer(x)
    layer.merge()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), y, rtol=8 * eps, atol=16 * eps * 4)
    assert not torch.equal(layer.weight, before)
    size = (before.abs() + layer.delta_weight().abs()).max().item()
    layer.unmerge()
    assert (layer.weight - before).abs().max() <= eps * size


def test_merging_twice_and_unmerging_unmerged_raise() -> None:
    layer = _trained()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    merged = layer.weight.clone()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    assert torch.equal(layer.weight, merged)


def test_a_merged_layer_loads_nothing() -> None:
    layer = _trained()
    state, x = copy.deepcopy(layer.state_dict()), torch.randn(3, 24)
    expected = layer(x)
    layer.merge()
    merged = layer.weight.clone()
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=r"0 is merged: .*call \.unmerge\(\) before loading"):
        model.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=False)
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_a_merge_that_would_not_be_finite_changes_nothing() -> None:
    layer = _trained()
    with torch.no_grad():
        layer.lora_B[0, 0] = float("inf")
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_training_a_merged_layer_raises_and_inference_does_not() -> None:
    layer = _trained()
    layer.merge()
    x = torch.randn(2, 24)
    with pytest.raises(RuntimeError, match="merged.*unmerge"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.unmerge()
    layer.train()(x).sum().backward()
    assert layer.lora_A.grad is not None


def test_dropout_acts_in_training_only() -> None:
    layer, x = _trained(lora_dropout=0.5), torch.randn(4, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_extra_repr_names_every_option() -> None:
    text = repr(_trained(lora_dropout=0.1, use_rslora=True))
    for part in ("in_features=24", "out_features=16", "r=4", "lora_alpha=8", "lora_dropout=0.1",
                 "use_rslora=True", "bias=True"):  # fmt: skip
        assert part in text
    layer = _trained()
    layer.merge()
    assert "merged=True" in repr(layer)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_survives_copying(way: str) -> None:
    layer, x = _trained(), torch.randn(2, 24)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"r": 0}, ValueError, "r must be an integer of at least 1, got 0"),
        ({"r": 2.0}, ValueError, "r must be an integer"),
        ({"r": 2, "lora_dropout": 1.0}, ValueError, r"lora_dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LoRALinear(8, 8, lora_alpha=1, **options)


def test_from_linear_refuses_what_is_not_exactly_a_linear() -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    with pytest.raises(TypeError, match="Other"):
        LoRALinear.from_linear(Other(4, 4), r=1, lora_alpha=1)
    with pytest.raises(TypeError, match="Conv1d"):
        LoRALinear.from_linear(nn.Conv1d(4, 4, 1), r=1, lora_alpha=1)  # type: ignore[arg-type]


def test_from_linear_refuses_what_it_would_lose() -> None:
    pruned = nn.Linear(8, 8).requires_grad_(False)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"linear\.weight is no parameter.*weight_orig"):
        LoRALinear.from_linear(pruned, r=2, lora_alpha=2)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hooked = nn.Linear(8, 8)
        handle = getattr(hooked, register)(lambda *_: None)
        with pytest.raises(ValueError, match="has forward hooks"):
            LoRALinear.from_linear(hooked, r=2, lora_alpha=2)
        handle.remove()
        LoRALinear.from_linear(hooked, r=2, lora_alpha=2)


def test_equals_pefts_layer_and_its_gradients() -> None:
    lora = pytest.importorskip("peft.tuners.lora", reason="peft is not installed")
    peft = pytest.importorskip("peft")
    linear = nn.Linear(24, 16)
    theirs = lora.Linear(
        linear, adapter_name="default", r=4, lora_alpha=8,
        config=peft.LoraConfig(r=4, lora_alpha=8),
    )  # fmt: skip
    ours = LoRALinear.from_linear(copy.deepcopy(linear), r=4, lora_alpha=8)
    with torch.no_grad():
        nn.init.normal_(theirs.lora_B["default"].weight)
        ours.lora_A.copy_(theirs.lora_A["default"].weight)
        ours.lora_B.copy_(theirs.lora_B["default"].weight)
    x = torch.randn(5, 24)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(one), theirs(other)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["default"].weight.grad)


def test_ranks_above_both_sizes_and_one_feature_work() -> None:
    layer = LoRALinear(1, 1, r=3, lora_alpha=3)
    layer(torch.randn(2, 1)).sum().backward()
    assert layer.lora_B.grad.shape == (1, 3)
