"""``accelerate`` on bottlenecks of adapters: the same results, the same model afterwards.

Runs in an environment of its own (``make test-adapters``): adapters pins an older transformers.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

adapters = pytest.importorskip(
    "adapters", reason="needs adapters, which excludes this transformers: make test-adapters"
)

from adapters import BnConfig  # noqa: E402
from adapters.composition import BatchSplit, Fuse, Stack  # noqa: E402
from adapters.methods import modeling  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_kernels import accelerate, adapter, unaccelerate  # noqa: E402
from peft_kernels.models.fused import adapters_bottleneck  # noqa: E402

pytestmark = pytest.mark.external

VOCABULARY = 96


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


MODELS = {"bert": _bert, "llama": _llama}


def _built(kind: str, *configs: Any, setup: Any = None) -> Any:
    """Return a model with adapters "a", "b", ..., the same one each time, trained a little."""
    torch.manual_seed(0)
    model: Any = MODELS[kind]()
    adapters.init(model)
    names = "abc"[: len(configs)]
    for name, config in zip(names, configs, strict=True):
        model.add_adapter(name, config=config)
    model.train_adapter(list(names))
    model.set_active_adapters(Stack(*names) if setup is None else setup)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def _inputs(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (4, 11), generator=generator)
    return {"input_ids": ids, "labels": ids if kind == "llama" else ids[:, 0] % 2}


def _results(kind: str, model: Any) -> dict[str, Tensor]:
    """Return logits, loss and the gradients of what is trained, by name."""
    model.zero_grad()
    output = model(**_inputs(kind))
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any(".adapters." in name and value.any() for name, value in expected.items())
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        torch.testing.assert_close(
            actual[name], value, rtol=2e-5, atol=2e-6 + 1e-5 * value.abs().max().item(), msg=name
        )


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list that grows by the options of each call of the kernel."""
    calls: list[dict[str, Any]] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return adapter(*args, **kwargs)

    monkeypatch.setattr(adapters_bottleneck, "adapter", counted)
    return calls


def _bottleneck(**options: Any) -> BnConfig:
    given = {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 6,
        "non_linearity": "gelu",
    }  # fmt: skip
    return BnConfig(**(given | options))


NAMED = ["seq_bn[reduction_factor=4]", "double_seq_bn[reduction_factor=7]",
         "par_bn[reduction_factor=3]"]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("config", NAMED)
@pytest.mark.parametrize("kind", MODELS)
def test_same_logits_and_gradients(
    kind: str, config: str, training: bool, fused_calls: list[dict[str, Any]]
) -> None:
    model = _built(kind, config).train(training)
    plain = copy.deepcopy(model)
    report = accelerate(model, strict=True)
    assert {op for _, op in report.accelerated} == {"adapter"}
    assert len(report.accelerated) == (4 if "double" in config else 2)
    assert list(model.state_dict()) == list(plain.state_dict())
    _assert_same(_results(kind, model), _results(kind, plain))
    assert len(fused_calls) == len(report.accelerated)


OPTIONS: dict[str, dict[str, Any]] = {
    "norm before": {"ln_before": True},
    "norm after": {"ln_after": True},
    "norm after the residual": {"ln_after": True, "adapter_residual_before_ln": True},
    "learned scale": {"scaling": "learned"},
    "scale of channels": {"scaling": "channel"},
    "a number": {"scaling": 2.5},
    "the input is the residual": {"residual_before_ln": False},
    "residual after the addition": {
        "original_ln_before": True, "residual_before_ln": "post_add",
    },
    "no norms of the model": {"original_ln_before": False},
    **{
        f"{name}": {"non_linearity": name}
        for name in ("relu", "swish", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "leakyrelu",
                     "leaky_relu", "tanh", "quick_gelu", "mish", "linear", "relu6", "sigmoid",
                     "silu")
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options_of_the_bottleneck(
    options: dict[str, Any], fused_calls: list[dict[str, Any]]
) -> None:
    # What is around the bottleneck differs between the two, the non-linearity does not.
    for kind in ["llama"] if "non_linearity" in options else MODELS:
        if kind == "llama" and options.get("residual_before_ln", True) is not True:
            continue  # adapters refuses it there
        model = _built(kind, _bottleneck(**options))
        plain = copy.deepcopy(model)
        accelerate(model, strict=True)
        fused_calls.clear()
        _assert_same(_results(kind, model), _results(kind, plain))
        assert len(fused_calls) == 2
        if options.get("residual_before_ln", True) is False:
            assert {call["residual"] for call in fused_calls} == {"input"}


def test_dropout_is_the_kernels_in_training_alone(fused_calls: list[dict[str, Any]]) -> None:
    model = _built("bert", _bottleneck(dropout=0.5))
    plain = copy.deepcopy(model).eval()
    accelerate(model, strict=True)
    _assert_same(_results("bert", model.eval()), _results("bert", plain))
    model.train()
    losses = {_results("bert", model)["loss"].item() for _ in range(4)}
    assert len(losses) == 4
    assert {(call["dropout_p"], call["training"]) for call in fused_calls} == {
        (0.5, False), (0.5, True),
    }  # fmt: skip


SKIPPED: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"use_gating": True}, "it has a gate"),
    "phm": ({"phm_layer": True, "reduction_factor": 4}, "it has a PHMLayer"),
    "non-linearity": ({"non_linearity": "gelu_10"}, "its non-linearity.*has no kernel"),
}


@pytest.mark.parametrize("options,reason", SKIPPED.values(), ids=list(SKIPPED))
def test_what_has_no_kernel_is_skipped_with_the_reason(
    options: dict[str, Any], reason: str, fused_calls: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=f"(?s)no adapter layer.*can be accelerated.*{reason}"):
        accelerate(_built("bert", _bottleneck(**options)))
    model = _built("bert", _bottleneck(), _bottleneck(**options))
    plain = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"(?s)strict=True.*adapters.b: {reason}"):
        accelerate(model, strict=True)
    report = accelerate(model)
    assert [name.rpartition(".")[2] for name, _ in report.accelerated] == ["a", "a"]
    assert [name.rpartition(".")[2] for name, _ in report.skipped] == ["b", "b"]
    _assert_same(_results("bert", model), _results("bert", plain))
    assert len(fused_calls) == 2


def test_other_methods_are_reported(fused_calls: list[dict[str, Any]]) -> None:
    model = _built("bert", "mam")
    plain = copy.deepcopy(model)
    report = accelerate(model)
    assert len(report.accelerated) == 2
    assert {reason for _, reason in report.skipped} == {
        "no kernel for adapters.methods.prefix_tuning.PrefixTuningLayer"
    }
    for each in (model, plain):
        each.eval()
    _assert_same(_results("bert", model), _results("bert", plain))
    assert len(fused_calls) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapter_fusion_runs_its_own_forward(when: str, fused_calls: list[dict[str, Any]]) -> None:
    """It reads what a bottleneck gives before the residual is added."""
    model = _built("bert", _bottleneck(), _bottleneck(), _bottleneck())
    if when == "after":
        accelerate(model, strict=True)
    model.add_adapter_fusion(Fuse("a", "b"), set_active=True)
    model.train_adapter_fusion(Fuse("a", "b"), unfreeze_adapters=True)
    plain = copy.deepcopy(model)
    unaccelerate(plain)
    if when == "before":
        report = accelerate(model)
        assert [name.rpartition(".")[2] for name, _ in report.accelerated] == ["c", "c"]
        assert {reason.partition(",")[0] for _, reason in report.skipped} == {
            "it is part of an AdapterFusion"
        }
    _assert_same(_results("bert", model), _results("bert", plain))
    assert not fused_calls
    for each in (model, plain):
        each.set_active_adapters("c")
    with torch.no_grad():
        logits = [each(**_inputs("bert")).logits for each in (model, plain)]
    torch.testing.assert_close(logits[0], logits[1])
    assert len(fused_calls) == 2


def test_one_batch_for_two_adapters_one_of_them_gated(
    fused_calls: list[dict[str, Any]],
) -> None:
    setup = BatchSplit("a", "b", batch_sizes=[1, 3])
    for second in ({}, {"use_gating": True}):
        model = _built("bert", _bottleneck(), _bottleneck(**second), setup=setup)
        plain = copy.deepcopy(model)
        accelerate(model)
        fused_calls.clear()
        _assert_same(_results("bert", model), _results("bert", plain))
        assert len(fused_calls) == (2 if second else 4)


AUTOCAST: dict[str, tuple[str, dict[str, Any], int]] = {
    "bert": ("bert", {"scaling": 2.0}, 2),
    "llama": ("llama", {"scaling": 2.0}, 2),
    # A learned scale is float32: eager PyTorch multiplies in float32 then.
    "learned": ("llama", {"scaling": "learned"}, 0),
    "wider residual": ("bert", {"original_ln_before": True, "residual_before_ln": False}, 2),
}


@pytest.mark.parametrize("kind,options,calls", AUTOCAST.values(), ids=list(AUTOCAST))
def test_autocast_gives_the_same_dtypes(
    kind: str, options: dict[str, Any], calls: int, fused_calls: list[dict[str, Any]]
) -> None:
    model = _built(kind, _bottleneck(**options))
    plain = copy.deepcopy(model)
    exact = _results(kind, copy.deepcopy(model).double())
    accelerate(model, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, eager = _results(kind, model), _results(kind, plain)
    assert len(fused_calls) == calls
    for name, value in exact.items():
        assert actual[name].dtype == eager[name].dtype, name
        unit = torch.finfo(torch.bfloat16).eps / 2 * value.abs().max()
        errors = [(each[name].double() - value).abs().max() for each in (actual, eager)]
        assert errors[0] <= 1.5 * errors[1] + unit, name


def test_adapters_goes_on_as_before(fused_calls: list[dict[str, Any]], tmp_path: Path) -> None:
    model = _built("bert", _bottleneck())
    plain = copy.deepcopy(model)
    accelerate(model)
    model.save_adapter(str(tmp_path), "a", use_safetensors=True)
    for each in (model, plain):
        torch.manual_seed(3)
        each.add_adapter("b", config=_bottleneck(ln_after=True))
        each.set_active_adapters(Stack("a", "b"))
    _assert_same(_results("bert", model), _results("bert", plain))
    assert len(fused_calls) == 2
    assert len(accelerate(model).accelerated) == 4
    _assert_same(_results("bert", model), _results("bert", plain))
    assert len(fused_calls) == 6
    for each in (model, plain):
        each.delete_adapter("b")
        each.load_adapter(str(tmp_path), load_as="c", set_active=True, use_safetensors=True)
    _assert_same(_results("bert", model), _results("bert", plain))


def test_copies_pickles_and_back(fused_calls: list[dict[str, Any]]) -> None:
    model = _built("bert", _bottleneck(), "par_bn[reduction_factor=3]", setup="a")
    plain = copy.deepcopy(model)
    accelerate(model, strict=True)
    expected = _results("bert", plain)
    each = copy.deepcopy(model)
    _assert_same(_results("bert", each), expected)
    assert len(fused_calls) == 2
    each.set_active_adapters(None)
    fused_calls.clear()
    each(**_inputs("bert"))
    assert not fused_calls
    assert len(unaccelerate(model)) == 4
    _assert_same(_results("bert", model), expected)
    assert not fused_calls
    kinds = {type(each) for each in model.modules() if isinstance(each, modeling.Adapter)}
    assert kinds == {modeling.Adapter, modeling.ParallelAdapter}
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()


def test_a_layer_pickles(fused_calls: list[dict[str, Any]]) -> None:
    """The model does not: adapters gives it a class that it makes on the spot."""
    layer = _built("llama", _bottleneck()).model.layers[0].output_adapters
    x = torch.randn(2, 5, 48)
    expected = layer.adapters["a"](x, x)[0]
    accelerate(layer, strict=True)
    again = pickle.loads(pickle.dumps(layer))
    y, down, up = again.adapters["a"](x, x)
    torch.testing.assert_close(y, expected)
    assert down is up is None and len(fused_calls) == 1
    assert again.adapters["a"].peft_kernels_fusions is again.adapter_fusion_layer


def test_hooks_inside_run_the_own_forward(fused_calls: list[dict[str, Any]]) -> None:
    model = _built("bert", _bottleneck())
    plain = copy.deepcopy(model)
    accelerate(model)
    seen: list[int] = []
    first, second = (each for each in model.modules() if isinstance(each, modeling.Adapter))
    first.adapter_up.register_forward_hook(lambda *args: seen.append(1))
    second.register_forward_hook(lambda *args: seen.append(2))
    _assert_same(_results("bert", model), _results("bert", plain))
    assert seen == [1, 2]
    assert len(fused_calls) == 1


def test_a_model_without_an_adapter_is_refused() -> None:
    model = _bert()
    adapters.init(model)
    with pytest.raises(ValueError, match="no adapter layer that peft or adapters made"):
        accelerate(model)
