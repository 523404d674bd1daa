"""Adapters behind and beside the layers of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import AdaptedModule, Adapter, add_adapters


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        return self.norm(x + self.down(torch.relu(self.up(x))))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


def _by_hand(layer: Adapter, x: Tensor) -> Tensor:
    activation = {"relu": F.relu, "silu": F.silu}[layer.activation]
    hidden = activation(F.linear(x, layer.down_weight, layer.down_bias))
    assert isinstance(layer.scale, float)
    return layer.scale * F.linear(hidden, layer.up_weight, layer.up_bias)


def test_pfeiffer_adapts_the_output_of_each_feed_forward_layer() -> None:
    model, x = _model(), torch.randn(2, 5, 32)
    plain = copy.deepcopy(model)
    assert add_adapters(model, "down") == ["0.down", "1.down"]
    layer = model[0].down.adapter
    assert (layer.activation, layer.bottleneck, layer.parallel) == ("relu", 2, False)
    hidden = x + plain[0].attention(x, x, x)[0]
    out = plain[0].down(torch.relu(plain[0].up(hidden)))
    expected = plain[0].norm(hidden + out + _by_hand(layer, out))
    torch.testing.assert_close(model[0](x), expected)


def test_houlsby_adapts_attention_too() -> None:
    model, x = _model(), torch.randn(2, 5, 32)
    plain = copy.deepcopy(model)
    names = add_adapters(model, ["attention", "down"], "houlsby", bottleneck=3)
    assert names == ["0.attention", "0.down", "1.attention", "1.down"]
    first, second = model[0].attention.adapter, model[0].down.adapter
    assert first.activation == "silu" and first.bottleneck == second.bottleneck == 3
    attended = plain[0].attention(x, x, x)[0]
    hidden = x + attended + _by_hand(first, attended)
    out = plain[0].down(torch.relu(plain[0].up(hidden)))
    expected = plain[0].norm(hidden + out + _by_hand(second, out))
    torch.testing.assert_close(model[0](x), expected)


def test_parallel_adapters_are_fed_with_the_modules_input() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(5, 32)
    add_adapters(model, "0", "parallel")
    layer = model[0].adapter
    assert (layer.scale, layer.bottleneck, layer.init) == (4.0, 16, "mam_adapter")
    torch.testing.assert_close(model(x), model[0].module(x))
    nn.init.normal_(layer.up_weight)
    torch.testing.assert_close(model(x), model[0].module(x) + _by_hand(layer, x))


class ByKeyword(nn.Module):
    """Calls its layer as transformers' models call their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize("style", ["pfeiffer", "parallel"])
def test_a_module_that_is_called_by_keywords_is_adapted(style: str) -> None:
    model, x = ByKeyword(), torch.randn(5, 32)
    add_adapters(model, "layer", style, init="bert")
    torch.testing.assert_close(model(x), model.layer(x))
    assert not torch.equal(model(x), model.layer.module(x))


def test_an_input_that_cannot_be_told_is_asked_for() -> None:
    class AnyName(nn.Module):
        def forward(self, **states: Tensor) -> Tensor:
            return states["hidden"]

    layer = AdaptedModule(AnyName(), Adapter(32, parallel=True))
    with pytest.raises(TypeError, match="pass the input of AnyName as its first argument"):
        layer(hidden=torch.randn(5, 32))


def test_a_transformer_layer_finds_what_it_reads_of_its_attention() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 32)
    add_adapters(encoder, ["self_attn", "linear2"], "houlsby")
    trained = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), trained)
    assert encoder.layers[0].self_attn.num_heads == 4
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = encoder.layers[0].self_attn.nothing
    torch.testing.assert_close(copy.deepcopy(encoder)(x), encoder(x))


def test_what_is_private_to_the_module_stays_there() -> None:
    linear = nn.Linear(8, 8)
    linear._old_forward = linear.forward  # type: ignore[assignment]  # as accelerate's hooks do
    layer = AdaptedModule(linear, Adapter(8))
    assert layer.in_features == 8 and not hasattr(layer, "_old_forward")


def test_only_the_adapters_are_trained_and_learn() -> None:
    model, x, target = _model(), torch.randn(4, 5, 32), torch.randn(4, 5, 32)
    add_adapters(model, "down", init="mam_adapter", bottleneck=8)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter." in name for name in trained) and len(trained) == 8
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_device_dtype_and_mode_follow_the_module() -> None:
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.bfloat16)).eval()
    add_adapters(model, "0", dropout=0.5)
    assert model[0].adapter.up_weight.dtype == torch.bfloat16 and not model[0].adapter.training
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).shape == (2, 16)


def test_a_module_of_unknown_width_needs_d_model() -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 1), nn.ReLU())
    with pytest.raises(ValueError, match="width of a ReLU's output is not known"):
        add_adapters(model, "1")
    assert add_adapters(model, "1", d_model=16) == ["1"]
    assert isinstance(model[1], AdaptedModule)


def test_bad_input_is_refused_and_changes_nothing() -> None:
    model = _model()
    with pytest.raises(ValueError, match="style must be one of pfeiffer, houlsby, parallel"):
        add_adapters(model, "down", "lora")
    with pytest.raises(ValueError, match="reads without calling.*'0.attention'"):
        add_adapters(model, "out_proj")
    with pytest.raises(ValueError, match="matched no module"):
        add_adapters(model, "feed_forward")
    assert not any(isinstance(module, AdaptedModule) for module in model.modules())
