"""Layers that read the same x, run as one op by ``accelerate``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_kernels import accelerate, lora_projections, unaccelerate
from peft_kernels.core import projections_tiles
from peft_kernels.models.fused import projections
from tests.models.peft_models import assert_same, built, logits_and_gradients, lora_config, pair

pytestmark = pytest.mark.external


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of layers of each call of the op."""
    calls: list[int] = []

    def counted(x: Tensor, weights: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        calls.append(len(weights))
        return lora_projections(x, weights, *args, **kwargs)

    monkeypatch.setattr(projections, "lora_projections", counted)
    # Groups are for GPUs: here they are to run on CPU tensors.
    monkeypatch.setattr(projections_tiles, "serves", lambda device: True)
    monkeypatch.setattr(projections_tiles, "pays_dropped", lambda *given: True)
    return calls


def test_llama_runs_five_layers_as_two_ops(groups: list[int]) -> None:
    model, plain = pair(lora_config())
    report = accelerate(model)
    assert len(report.projections) == 4
    assert report.projections[0] == tuple(
        f"base_model.model.model.layers.0.self_attn.{name}"
        for name in ("q_proj", "k_proj", "v_proj")
    )
    assert "q_proj, k_proj, v_proj run as one op on GPUs in 2 modules" in str(report)
    assert "gate_proj, up_proj run as one op on GPUs in 2 modules" in str(report)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert sorted(groups) == [2, 2, 3, 3]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_on_a_cpu_every_layer_runs_by_itself(
    groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    plain = attention()
    model = copy.deepcopy(plain)
    accelerate(model)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(model(x, x), plain(x, x))
    held = model.base_model.model.q_proj.__dict__[projections.GROUP]
    model.base_model.model.q_proj(x)
    assert held.active and not held._waiting.ready


def test_layers_that_drop_run_by_themselves_where_that_is_quicker(
    groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attention(lora_dropout=0.5)
    accelerate(model)
    x = torch.randn(2, 5, 16)
    asked: list[tuple[int, ...]] = []

    def no(device: torch.device, dtype: torch.dtype, *size: int) -> bool:
        asked.append(size)
        return False

    monkeypatch.setattr(projections_tiles, "pays_dropped", no)
    model(x, x)
    assert set(asked) == {(10, 16, 48)} and not groups
    model.eval()(x, x)
    assert groups == [3]


def test_switched_off_and_undone(groups: list[int]) -> None:
    model, plain = pair(lora_config())
    assert accelerate(model, projections=False).projections == ()
    logits_and_gradients(model)
    assert not groups
    assert accelerate(model).projections
    assert accelerate(model, projections=False).projections == ()
    accelerate(model)
    unaccelerate(model)
    assert_same(logits_and_gradients(model), logits_and_gradients(plain))
    assert not groups
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()


class Attention(nn.Module):
    """Projections that a test calls as it likes."""

    def __init__(self, width: int = 16) -> None:
        """Make three."""
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Attend to ``other``, which may be x."""
        return torch.softmax(self.q_proj(x) @ self.k_proj(other).mT, -1) @ self.v_proj(other)


def attention(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    given = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    return get_peft_model(Attention(), LoraConfig(**(given | options)))


def test_cross_attention_runs_one_by_one(groups: list[int]) -> None:
    plain = attention()
    model = copy.deepcopy(plain)
    accelerate(model)
    x, other = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    for _ in range(3):
        torch.testing.assert_close(model(x, other), plain(x, other))
    # Once it was not known yet.
    assert groups == [3]
    torch.testing.assert_close(model(x, x), plain(x, x))
    assert groups == [3]


def test_a_result_is_handed_out_only_for_what_it_was_made_of(groups: list[int]) -> None:
    plain = attention()
    model = copy.deepcopy(plain)
    accelerate(model)
    ours, theirs = model.base_model.model, plain.base_model.model
    x = torch.randn(3, 16)

    def alike() -> None:
        torch.testing.assert_close(ours.k_proj(x), theirs.k_proj(x))
        torch.testing.assert_close(ours.v_proj(x), theirs.v_proj(x))

    ours.q_proj(x)
    x.add_(1.0)
    alike()
    ours.q_proj(x)
    with torch.no_grad():
        for layers in (ours, theirs):
            layers.k_proj.lora_A["default"].weight.mul_(2.0)
    alike()
    with torch.no_grad():
        ours.q_proj(x)
    assert ours.k_proj(x).requires_grad
    ours.q_proj(x)
    ours.eval(), theirs.eval()
    alike()
    # It stays a group: nothing of this was another tensor.
    groups.clear()
    ours(x, x)
    assert groups == [3]


def test_a_layer_that_was_switched_between_two_calls_of_a_group(groups: list[int]) -> None:
    plain = attention()
    plain.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    model = copy.deepcopy(plain)
    accelerate(model)
    ours, theirs = model.base_model.model, plain.base_model.model
    x = torch.randn(3, 16)

    def switched(change: Callable[[Any], object]) -> None:
        ours.q_proj(x)
        before = theirs.k_proj(x)
        for layers in (ours, theirs):
            change(layers.k_proj)
        assert not torch.allclose(theirs.k_proj(x), before)
        torch.testing.assert_close(ours.k_proj(x), theirs.k_proj(x))
        torch.testing.assert_close(ours.v_proj(x), theirs.v_proj(x))

    switched(lambda layer: layer.set_adapter("other"))
    switched(lambda layer: layer.set_adapter(["default", "other"]))
    switched(lambda layer: layer.set_adapter("default"))
    switched(lambda layer: layer.scale_layer(3.0))
    switched(
        lambda layer: setattr(layer.lora_A["default"], "weight", nn.Parameter(torch.ones(4, 16)))
    )
    switched(lambda layer: layer.enable_adapters(False))
    switched(lambda layer: layer.enable_adapters(True))
    groups.clear()
    ours(x, x)
    assert groups == [3]


def test_what_is_made_in_inference_mode_runs_one_by_one(groups: list[int]) -> None:
    plain = attention()
    model = copy.deepcopy(plain)
    accelerate(model)
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        given = x + 1.0
        torch.testing.assert_close(model(given, given), plain(given, given))
        assert not groups
        torch.testing.assert_close(model(x, x), plain(x, x))
        assert groups == [3]
        loaded = attention()
        accelerate(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, x), plain(x, x))
    assert groups == [3]


def test_nothing_waits_after_a_pass() -> None:
    model = attention()
    accelerate(model)
    x = torch.randn(2, 5, 16)
    model(x, x)
    group = model.base_model.model.q_proj.__dict__[projections.GROUP]
    assert not group._waiting.ready and not group._waiting.key


def test_what_waits_is_for_the_thread_that_computed_it(groups: list[int]) -> None:
    plain = attention()
    model = copy.deepcopy(plain)
    accelerate(model)
    ours, theirs = model.base_model.model, plain.base_model.model
    x, of_another_thread = torch.randn(3, 16), torch.randn(3, 16)
    ours.q_proj(x)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(ours.q_proj, of_another_thread).result()
        torch.testing.assert_close(ours.k_proj(x), theirs.k_proj(x))
        torch.testing.assert_close(ours.v_proj(x), theirs.v_proj(x))
        theirs_there = theirs.k_proj(of_another_thread)
        there = thread.submit(ours.k_proj, of_another_thread).result()
    torch.testing.assert_close(there, theirs_there)
    ours(x, x)
    # It stays a group: each thread called its layers with one tensor.
    assert groups == [3, 3, 3]


def test_copies_have_groups_of_their_own(groups: list[int]) -> None:
    model = attention()
    accelerate(model)
    x = torch.randn(2, 5, 16)
    expected = model(x, x)
    model.base_model.model.q_proj(x)  # something waits while the copy is made
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        groups.clear()
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.mul_(2.0 if "lora_" in name else 1.0)
        assert not torch.equal(other(x, x), expected)
        assert groups == [3]
        held = other.base_model.model.v_proj.__dict__[projections.GROUP]
        assert held.members[0] is other.base_model.model.q_proj


def test_layers_that_cannot_all_run_fused_run_one_by_one(groups: list[int]) -> None:
    plain = attention()
    model = copy.deepcopy(plain)
    accelerate(model)
    x = torch.randn(2, 5, 16)
    for each in (model, plain):
        each.base_model.model.v_proj.merge()
    torch.testing.assert_close(model(x, x), plain(x, x))
    assert not groups
    seen: list[object] = []
    for each in (model, plain):
        each.base_model.model.v_proj.unmerge()
    layer = model.base_model.model.k_proj.base_layer
    layer.register_forward_hook(lambda *given: seen.append(given))
    torch.testing.assert_close(model(x, x), plain(x, x))
    assert len(seen) == 1 and not groups


def test_masks_are_independent(groups: list[int]) -> None:
    model = attention(lora_dropout=0.5)
    accelerate(model)
    layers = model.base_model.model
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            for part in ("base_layer", "lora_A", "lora_B"):
                source = getattr(layers.q_proj, part).state_dict()
                getattr(getattr(layers, name), part).load_state_dict(source)
    x = torch.randn(4, 16)
    torch.manual_seed(3)
    first = [getattr(layers, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    torch.manual_seed(3)
    again = [getattr(layers, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    assert groups == [3, 3]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, groups: list[int]) -> None:
    model = built(lora_config(lora_dropout=0.2))
    accelerate(model)
    torch.manual_seed(7)
    expected = logits_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(7)
    actual = logits_and_gradients(model)
    assert len(groups) == 4 + 8
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


class _Mixed(nn.Module):
    """Query, key and value of one x, the key outside of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        query = self.q_proj(x)
        with torch.autocast("cpu", enabled=False):
            key = self.k_proj(x)
        return query, key, self.v_proj(x)


def _mixed() -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    return get_peft_model(_Mixed(), config)  # type: ignore[arg-type]


def test_what_was_made_under_autocast_is_for_calls_under_it(groups: list[int]) -> None:
    model = _mixed()
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.randn(3, 16))
    assert [y.dtype for y in found] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert groups[0] == 3


def test_what_waits_is_gone_once_a_result_was_differentiated(groups: list[int]) -> None:
    model = _mixed()
    accelerate(model)
    layers, x = model.base_model.model, torch.randn(3, 16)
    layers.k_proj(x).sum().backward()  # one alone: query and value wait, their graph is gone
    sum(y.sum() for y in layers(x)).backward()
    assert groups == [3, 3]
