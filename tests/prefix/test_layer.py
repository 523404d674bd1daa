"""``PrefixAttention``: what ``nn.MultiheadAttention`` gives, sharing, training, state dicts."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import PrefixAttention, explain

E, HEADS = 32, 4
X = torch.randn(2, 7, E, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(2, 5, E, generator=torch.Generator().manual_seed(2))
IGNORED = torch.tensor([[True, True, False, False, False, False, False], [False] * 7])


def base(**options: Any) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)
    # nn.MultiheadAttention starts its biases at zero, where a wrong one would not show.
    with torch.no_grad():
        for name, each in made.named_parameters():
            if "bias" in name:
                each.normal_()
    return made


def layer(**options: Any) -> PrefixAttention:
    mha = options.pop("mha", None) or base()
    return PrefixAttention.from_mha(mha, **{"num_virtual_tokens": 3, **options})


CALLS: dict[str, dict[str, Any]] = {
    "self": {"query": X, "key": X, "value": X},
    "cross": {"query": OTHER, "key": X, "value": X},
    "three": {"query": X, "key": OTHER, "value": OTHER.flip(0)},
    "padded": {"query": X, "key": X, "value": X, "key_padding_mask": IGNORED},
    "padded by -inf": {
        "query": X,
        "key": X,
        "value": X,
        "key_padding_mask": torch.zeros(2, 7).masked_fill(IGNORED, -torch.inf),
    },
    "causal": {
        "query": X,
        "key": X,
        "value": X,
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(7),
        "is_causal": True,
    },
    "single": {"query": X[0], "key": OTHER[0], "value": OTHER[0]},
    "single padded": {"query": X[0], "key": X[0], "value": X[0], "key_padding_mask": IGNORED[0]},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_without_virtual_tokens_it_is_the_base_layer(call: str, bias: bool, gated: bool) -> None:
    mha = base(bias=bias)
    made = layer(mha=mha, num_virtual_tokens=0, gated=gated)
    expected, _ = mha(**CALLS[call], need_weights=False)
    out, weights = made(**CALLS[call], need_weights=False)
    assert weights is None
    torch.testing.assert_close(out, expected)


def test_key_and_value_of_widths_of_their_own() -> None:
    mha = nn.MultiheadAttention(E, HEADS, kdim=20, vdim=24, batch_first=True)
    key, value = torch.randn(2, 5, 20), torch.randn(2, 5, 24)
    made = layer(mha=mha, num_virtual_tokens=0)
    expected, _ = mha(X, key, value, need_weights=False)
    torch.testing.assert_close(made(X, key, value)[0], expected)
    assert made.q_proj_weight is mha.q_proj_weight and not mha.k_proj_weight.requires_grad


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_prefix_is_in_front_of_projected_keys_and_values(gated: bool, causal: bool) -> None:
    mha = base()
    made = layer(mha=mha, gated=gated, causal=causal)
    nn.init.normal_(made.prefix_key)
    nn.init.normal_(made.prefix_value)
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in F.linear(X, mha.in_proj_weight, mha.in_proj_bias).chunk(3, -1)
    )
    prefix = [p.expand(2, -1, -1, -1) for p in (made.prefix_key, made.prefix_value)]
    if gated:
        nn.init.normal_(made.gate)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        factor = made.gate.tanh()[:, None, None]
        heads = heads + factor * F.scaled_dot_product_attention(q, *prefix)
    else:
        mask = torch.ones(7, 10, dtype=torch.bool).tril(3) if causal else None
        both = [torch.cat(pair, 2) for pair in zip(prefix, (k, v), strict=True)]
        heads = F.scaled_dot_product_attention(q, *both, attn_mask=mask)
    expected = mha.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(made(X)[0], expected)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads_share_keys_in_neighbouring_groups(kv_heads: int) -> None:
    made = PrefixAttention(E, HEADS, num_virtual_tokens=3, num_kv_heads=kv_heads)
    assert made.in_proj_weight.shape == (E + 2 * kv_heads * 8, E)
    assert made.prefix_key.shape == (kv_heads, 3, 8)
    whole = PrefixAttention(E, HEADS, num_virtual_tokens=3)
    with torch.no_grad():
        q, k, v = made.in_proj_weight.split([E, kv_heads * 8, kv_heads * 8])
        repeated = [
            part.view(kv_heads, 8, E).repeat_interleave(HEADS // kv_heads, 0).view(E, E)
            for part in (k, v)
        ]
        whole.in_proj_weight.copy_(torch.cat([q, *repeated]))
        for name in ("prefix_key", "prefix_value"):
            own = getattr(made, name).normal_()
            getattr(whole, name).copy_(own.repeat_interleave(HEADS // kv_heads, 0))
        whole.out_proj.load_state_dict(made.out_proj.state_dict())
    torch.testing.assert_close(made(X)[0], whole(X)[0])


def test_a_gated_layer_starts_as_its_base_bit_for_bit() -> None:
    mha = base()
    gated, bare = layer(mha=mha, gated=True), layer(mha=mha, num_virtual_tokens=0)
    assert torch.equal(gated(X)[0], bare(X)[0])
    gated(X)[0].square().sum().backward()
    assert (gated.gate.grad != 0).all()


def test_projections_are_shared_and_frozen_and_the_prefix_trained() -> None:
    mha = base()
    made = layer(mha=mha, gated=True)
    assert made.in_proj_weight is mha.in_proj_weight and made.out_proj is mha.out_proj
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert trained == ["prefix_key", "prefix_value", "gate"]
    assert not any(p.requires_grad for p in mha.parameters())
    nn.init.ones_(made.gate)
    made(X)[0].square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in made.parameters())


def test_a_state_dict_of_the_base_fits() -> None:
    mha = base()
    made = PrefixAttention(E, HEADS, num_virtual_tokens=0)
    found = made.load_state_dict(mha.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert sorted(found.missing_keys) == ["prefix_key", "prefix_value"]
    torch.testing.assert_close(made(X)[0], mha(X, X, X, need_weights=False)[0])


@pytest.mark.parametrize("hidden", [None, 9])
def test_the_projection_runs_once_a_call_on_the_tokens_alone_and_folds(hidden: int | None) -> None:
    made = layer(prefix_projection=True, projection_hidden=hidden, gated=True)
    nn.init.ones_(made.gate)
    seen: list[torch.Size] = []
    made.projection[0].register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    assert made.projection[0].out_features == (hidden or E)
    expected, _ = made(X)
    assert seen == [(3, E)]
    expected.square().sum().backward()
    trained = [name for name, p in made.named_parameters() if p.grad is not None]
    assert trained == [
        "prefix", "gate", "projection.0.weight", "projection.0.bias", "projection.2.weight",
        "projection.2.bias",
    ]  # fmt: skip
    made.fold()
    assert [n for n, p in made.named_parameters() if p.requires_grad] == [
        "prefix_key", "prefix_value", "gate",
    ]  # fmt: skip
    torch.testing.assert_close(made(X)[0], expected)
    plain = layer(gated=True)
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(plain(X)[0], expected)
    with pytest.raises(RuntimeError, match="no projection"):
        made.fold()


def test_the_projection_is_the_papers_mlp() -> None:
    made = layer(prefix_projection=True)
    first, _, second = made.projection
    rows = second(first(made.prefix).tanh())  # [P, 2 · E]
    key, value = (part.view(3, HEADS, 8).transpose(0, 1) for part in rows.chunk(2, -1))
    for found, expected in zip(made.virtual_tokens(), (key, value), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict", "torch.save"])
def test_copies_compute_the_same(how: str, projected: bool) -> None:
    made = layer(prefix_projection=projected, gated=True, causal=True)
    nn.init.ones_(made.gate)
    if how == "deepcopy":
        other = copy.deepcopy(made)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(made))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = layer(prefix_projection=projected, gated=True, causal=True)
        other.load_state_dict(made.state_dict())
    assert other.prefix_key is not made.prefix_key or projected
    assert torch.equal(other(X)[0], made(X)[0])


def test_dropout_is_the_bases_and_acts_in_training_alone() -> None:
    made = layer(mha=base(dropout=0.5))
    assert made.dropout == 0.5
    torch.manual_seed(3)
    first, second = made(X)[0], made(X)[0]
    torch.manual_seed(3)
    assert torch.equal(made(X)[0], first) and not torch.equal(first, second)
    made.eval()
    assert torch.equal(made(X)[0], made(X)[0])


def test_a_float32_prefix_beside_bfloat16_projections() -> None:
    made = layer(mha=base().bfloat16(), dtype=torch.float32, gated=True)
    nn.init.ones_(made.gate)
    out, _ = made(X.bfloat16())
    out.square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(
        p.grad.dtype == torch.float32 for p in (made.prefix_key, made.prefix_value, made.gate)
    )


def test_decoding_gives_the_last_rows_of_the_whole() -> None:
    made = layer(causal=True)
    whole, _ = made(X)
    last, _ = made(X[:, -2:], X, X)
    torch.testing.assert_close(last, whole[:, -2:])


def test_an_encoder_layer_does_not_pass_it_by_in_evaluation() -> None:
    encoder = nn.TransformerEncoderLayer(E, HEADS, 64, batch_first=True, dropout=0.0).eval()
    encoder.requires_grad_(False)
    plain = encoder(X, src_key_padding_mask=IGNORED)
    encoder.self_attn = layer(mha=encoder.self_attn).requires_grad_(False)
    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            found = encoder(X, src_key_padding_mask=IGNORED)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert not torch.allclose(found, plain, atol=1e-3)
    torch.nn.init.normal_(encoder.self_attn.prefix_value, std=10.0)
    assert not torch.allclose(encoder(X, src_key_padding_mask=IGNORED), found, atol=1e-3)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    assert encoder(X, src_mask=causal, is_causal=True).shape == X.shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_makes_padding_nested_is_told_how_to_stop() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 64, batch_first=True), 2)
    for each in encoder.layers:
        each.self_attn = layer(mha=each.self_attn)
    encoder.requires_grad_(False).eval()
    with pytest.raises(TypeError, match="query is a nested tensor.*set use_nested_tensor = False"):
        encoder(X, src_key_padding_mask=IGNORED.flip(1))
    encoder.use_nested_tensor = False
    assert encoder(X, src_key_padding_mask=IGNORED.flip(1)).shape == X.shape


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"need_weights": True}, ValueError, "need_weights=True: the attention weights are never"),
    ({"attn_mask": torch.zeros(7, 7)}, ValueError, "attn_mask has no kernel unless it is the"),
    ({"key": OTHER, "value": OTHER, "is_causal": True}, ValueError, "7 queries and 5 keys"),
    ({"key_padding_mask": IGNORED.long()}, TypeError, "key_padding_mask must be a bool tensor"),
    ({"key_padding_mask": IGNORED[:, 1:]}, ValueError, r"key_padding_mask must have .*\[2, 7\]"),
    ({"key_padding_mask": torch.ones(2, 7)}, ValueError, "key_padding_mask must hold 0"),
    ({"query": X[None]}, ValueError, r"query must have shape \[B, S, E\]"),
    ({"query": X[0], "key": OTHER}, ValueError, r"key must have shape .*got \[2, 5, 32\]"),
    ({"query": X.tolist()}, TypeError, "query must be a torch.Tensor"),
    ({"query": X[..., 1:]}, ValueError, r"query must be 32 wide, .*got \[2, 7, 31\]"),
    ({"key": OTHER, "value": OTHER[..., 1:]}, ValueError, r"value must be 32 wide"),
    ({"query": X.double()}, TypeError, "query is torch.float64 and the layer is torch.float32"),
    ({"key": OTHER[:1]}, ValueError, r"key must have query's batch of 2, got \[1, 5, 32\]"),
    ({"key": OTHER, "value": X}, ValueError, r"value must have a row .*\[2, 5\], got \[2, 7, 32\]"),
    ({"query": X[0], "key_padding_mask": [False] * 7}, TypeError, "key_padding_mask must be a bo"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_a_bad_call_is_refused_by_name(
    call: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        layer()(**({"query": X} | call))


BAD_LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"embed_dim": 30}, "embed_dim must be a multiple of num_heads, got 30 and 4"),
    ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    ({"num_kv_heads": 0}, "num_kv_heads must be an integer of at least 1, got 0"),
    ({"num_virtual_tokens": -1}, "num_virtual_tokens must be an integer of at least 0, got -1"),
    ({"prefix_projection": True, "projection_hidden": 0}, "projection_hidden must be an integer"),
    ({"projection_hidden": 8}, "projection_hidden .*got 8 without prefix_projection=True"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("options", "match"), BAD_LAYERS, ids=range(len(BAD_LAYERS)))
def test_a_bad_layer_is_refused_by_name(options: dict[str, Any], match: str) -> None:
    given = {"embed_dim": E, "num_heads": HEADS, "num_virtual_tokens": 3} | options
    with pytest.raises(ValueError, match=match):
        PrefixAttention(**given)


class _Own(nn.MultiheadAttention):
    pass


BAD_BASES: list[tuple[Any, type[Exception], str]] = [
    (nn.MultiheadAttention(E, HEADS), ValueError, "mha has batch_first=False"),
    (base(add_bias_kv=True), ValueError, "mha has add_bias_kv=True"),
    (base(add_zero_attn=True), ValueError, "mha has add_zero_attn=True"),
    (_Own(E, HEADS, batch_first=True), TypeError, "got .*_Own, whose forward may differ"),
    (nn.Linear(E, E), TypeError, "from_mha takes a torch.nn.MultiheadAttention, got"),
]


@pytest.mark.parametrize(("mha", "error", "match"), BAD_BASES, ids=range(len(BAD_BASES)))
def test_a_base_that_would_compute_something_else_is_refused_and_stays_as_it_was(
    mha: nn.Module, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        layer(mha=mha)
    assert all(p.requires_grad for p in mha.parameters())


def test_reset_parameters_leaves_the_projections_alone() -> None:
    made = layer(gated=True)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    with torch.no_grad():
        made.gate.fill_(2.0)
    made.reset_parameters()
    assert torch.equal(made.in_proj_weight, before["in_proj_weight"])
    assert not torch.equal(made.prefix_key, before["prefix_key"])
    assert not made.gate.any() and 0.01 < made.prefix_key.std() < 0.03


def test_what_it_is_is_shown_and_explained() -> None:
    made = PrefixAttention(
        E, HEADS, num_virtual_tokens=3, num_kv_heads=2, causal=True, gated=True, dropout=0.1,
        prefix_projection=True,
    )  # fmt: skip
    assert made.extra_repr() == (
        "embed_dim=32, num_heads=4, num_virtual_tokens=3, num_kv_heads=2, gated=True, "
        "prefix_projection=True, causal=True, dropout=0.1"
    )
    assert layer().extra_repr() == "embed_dim=32, num_heads=4, num_virtual_tokens=3"
    assert explain(made, X).op == "prefix_attention"
    made.backend = "reference"
    assert explain(made, X, X, X).backend == "reference"
    assert explain(made, query=X[0], key_padding_mask=IGNORED[0]).backend == "reference"
    with pytest.raises(ValueError, match="need_weights"):
        explain(made, X, need_weights=True)


def test_it_compiles_whole() -> None:
    made = layer(gated=True, prefix_projection=True, causal=True)
    nn.init.ones_(made.gate)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")

    def run(call: Any) -> Tensor:
        return call(X, key_padding_mask=IGNORED)[0]

    torch.testing.assert_close(run(compiled), run(made))
    run(compiled).sum().backward()
    assert made.prefix.grad is not None
