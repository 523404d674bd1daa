"""``Adapter`` the module: options, initialisation, and the ``adapters`` library's formulas."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import Adapter, explain


@pytest.mark.parametrize(
    ("options", "bottleneck"),
    [({}, 4), ({"reduction_factor": 96}, 1), ({"reduction_factor": 0.5}, 128),
     ({"reduction_factor": 3}, 21), ({"bottleneck": 7}, 7)],
)  # fmt: skip
def test_the_bottleneck_follows_from_the_reduction_factor(options: dict, bottleneck: int) -> None:
    layer = Adapter(64, **options)
    assert layer.bottleneck == bottleneck
    assert layer.down_weight.shape == (bottleneck, 64)
    assert layer.up_weight.shape == (64, bottleneck)


def test_state_dict_has_the_documented_keys_and_loads() -> None:
    options: dict = {"scale": "channel", "layer_norm_before": True, "layer_norm_after": True}
    layer, other = Adapter(32, **options), Adapter(32, **options)
    norms = [f"norm_{side}.{kind}" for side in ("before", "after") for kind in ("weight", "bias")]
    weights = ["down_weight", "up_weight", "down_bias", "up_bias"]
    assert set(layer.state_dict()) == {*weights, "scale", *norms}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), other(x))
    assert list(Adapter(32, bias=False).state_dict()) == ["down_weight", "up_weight"]


def test_bert_init() -> None:
    layer = Adapter(400, reduction_factor=4)
    for weight in (layer.down_weight, layer.up_weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.abs().max() > 0.04
    assert layer.down_bias.count_nonzero() == layer.up_bias.count_nonzero() == 0


def test_mam_adapter_init_starts_as_the_residual() -> None:
    layer = Adapter(400, reduction_factor=4, init="mam_adapter", activation="gelu")
    assert layer.up_weight.count_nonzero() == 0
    bound = math.sqrt(6 / ((1 + 5) * 400))
    assert layer.down_weight.abs().max() <= bound
    assert layer.down_weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    x = torch.randn(5, 400)
    assert torch.equal(layer(x), x)


def test_houlsby_init_is_cut_at_two_deviations() -> None:
    layer = Adapter(400, reduction_factor=4, init="houlsby")
    for weight in (layer.down_weight, layer.up_weight):
        assert 0.019 < weight.abs().max() <= 0.02
        # A normal cut at two deviations has 0.88 of the deviation.
        assert weight.std().item() == pytest.approx(0.0088, rel=0.05)


@pytest.mark.parametrize(("scale", "shape"), [("learned", ()), ("channel", (32,))])
def test_a_learned_scale_starts_at_one_and_is_trained(scale: str, shape: tuple) -> None:
    layer, x = Adapter(32, scale=scale), torch.randn(3, 32)
    assert isinstance(layer.scale, nn.Parameter) and layer.scale.shape == shape
    plain = Adapter(32)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "scale"})
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.scale.grad.shape == shape and layer.scale.grad.abs().max() > 0


def test_layer_norms_are_before_and_after_and_the_residual_stays_x() -> None:
    layer = Adapter(32, layer_norm_before=True, layer_norm_after=True, activation="silu")
    for norm in (layer.norm_before, layer.norm_after):
        nn.init.normal_(norm.weight)
    x = torch.randn(3, 32)
    hidden = F.silu(F.linear(layer.norm_before(x), layer.down_weight, layer.down_bias))
    expected = layer.norm_after(x + F.linear(hidden, layer.up_weight, layer.up_bias))
    torch.testing.assert_close(layer(x), expected)


def test_a_parallel_adapter_adds_to_what_it_is_given_and_demands_it() -> None:
    layer, x, beside = Adapter(32, parallel=True, scale=4.0), torch.randn(3, 32), torch.randn(3, 32)
    torch.testing.assert_close(layer(x, beside) - beside, Adapter.forward(layer, x, 0 * x))
    with pytest.raises(ValueError, match="parallel Adapter needs residual"):
        layer(x)


def test_dropout_acts_in_training_only() -> None:
    layer, x = Adapter(32, dropout=0.5), torch.randn(4, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_extra_repr_names_every_option() -> None:
    text = repr(Adapter(64, scale="channel", dropout=0.1, parallel=True, activation="mish"))
    for part in ("d_model=64", "bottleneck=4", "activation='mish'", "scale='channel'", "bias=True",
                 "dropout=0.1", "parallel=True"):  # fmt: skip
        assert part in text
    assert "scale='learned'" in repr(Adapter(64, scale="learned"))
    assert "scale=2.0" in repr(Adapter(64, scale=2))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_survives_copying(way: str) -> None:
    layer, x = Adapter(32, scale="learned"), torch.randn(2, 32)
    other = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))


def test_explain_takes_the_layer() -> None:
    said = explain(Adapter(32, dropout=0.1), torch.randn(4, 32))
    assert said.op == "adapter" and said.backend in ("cpp", "reference")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"d_model": 0}, ValueError, "d_model must be an integer of at least 1, got 0"),
        ({"bottleneck": 0}, ValueError, "bottleneck must be an integer of at least 1, got 0"),
        ({"bottleneck": 2.0}, ValueError, "bottleneck must be an integer"),
        ({"reduction_factor": 0}, ValueError, "reduction_factor must be a number above 0"),
        ({"activation": "swish"}, ValueError, "activation must be one of relu"),
        ({"scale": "trained"}, ValueError, 'scale must be a number, "learned" or "channel"'),
        ({"scale": None}, TypeError, "scale must be a number"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"init": "zeros"}, ValueError, "init must be one of bert, mam_adapter, houlsby"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Adapter(**({"d_model": 8} | options))


def _same(y: Tensor, expected: Tensor, layer: nn.Module, leaf: Tensor) -> None:
    """Compare two outputs and the gradients of all parameters and of an input."""
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, wanted, dy, retain_graph=True),
        torch.autograd.grad(expected, wanted, dy),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def _branch(layer: Adapter, x: Tensor, activation: object) -> Tensor:
    hidden = activation(F.linear(x, layer.down_weight, layer.down_bias))  # type: ignore[operator]
    return F.linear(hidden, layer.up_weight, layer.up_bias)


def _base(features: int) -> tuple[Tensor, Tensor, nn.LayerNorm]:
    """Return a sub-layer's output, the input of its residual, and the LayerNorm behind it."""
    norm = nn.LayerNorm(features)
    nn.init.normal_(norm.weight)
    hidden = torch.randn(2, 5, features, requires_grad=True)
    return hidden, torch.randn(2, 5, features), norm.requires_grad_(False)


def test_seq_bn_of_the_adapters_library() -> None:
    """SeqBnConfig (Pfeiffer): relu, D / 16; the base's residual and LayerNorm before and after.

    ``original_ln_before``: h = LN(hidden + input); ``residual_before_ln``: the adapter adds to
    hidden; ``original_ln_after``: LN(out + input).
    """
    hidden, beside, norm = _base(32)
    layer = Adapter(32, reduction_factor=16, activation="relu")
    nn.init.normal_(layer.up_weight)
    h = norm(hidden + beside)
    y = norm(layer(h, residual=hidden) + beside)
    expected = norm(hidden + _branch(layer, h, F.relu) + beside)
    _same(y, expected, layer, hidden)


def test_double_seq_bn_of_the_adapters_library() -> None:
    """DoubleSeqBnConfig (Houlsby): swish, D / 16, the adapter adds to its own input; LN after."""
    hidden, beside, norm = _base(32)
    layer = Adapter(32, reduction_factor=16, activation="silu")
    nn.init.normal_(layer.up_weight)
    y = norm(layer(hidden) + beside)
    expected = norm(_branch(layer, hidden, F.silu) + hidden + beside)
    _same(y, expected, layer, hidden)


def test_par_bn_of_the_adapters_library() -> None:
    """ParBnConfig (He et al.): relu, D / 2, scale 4, input of the layer beside it."""
    hidden, beside, norm = _base(32)
    layer = Adapter(
        32, reduction_factor=2, activation="relu", scale=4.0, parallel=True, init="mam_adapter"
    )
    nn.init.normal_(layer.up_weight)
    y = norm(layer(hidden, residual=beside) + beside)
    expected = norm(_branch(layer, hidden, F.relu) * 4.0 + beside + beside)
    _same(y, expected, layer, hidden)
