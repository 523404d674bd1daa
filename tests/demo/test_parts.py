"""The parts of the demo: data, both forms of LoRA, measuring, files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_kernels.demo import adapter_file, data, measure, methods, options, report, story, train
from peft_kernels.demo.methods import ADAPTER, LORA, PREFIX, PROMPT, Method, Options
from peft_kernels.demo.model import DigitTransformer, freeze

CPU = torch.device("cpu")


def small_frozen_model(dtype: torch.dtype = torch.float32) -> DigitTransformer:
    torch.manual_seed(1)
    model = DigitTransformer(width=32, heads=2, depth=1)
    freeze(model, dtype)
    return model


def small_settings(out: Path = Path("unused")) -> options.Settings:
    return options.resolve(options.parse(["--quick", "--device", "cpu", "--out", str(out)]))


def test_no_image_is_both_trained_on_and_held_out() -> None:
    known, new = data.load(0, CPU)
    parts = [known.train_images, known.test_images, new.train_images, new.test_images]
    # The data set has no duplicates within it, so that any repetition is a leak.
    images = torch.cat(parts).flatten(1)
    assert len(images) == 1797
    assert len(images.unique(dim=0)) == 1797


def test_known_and_new_digits_are_apart_and_split_class_by_class() -> None:
    known, new = data.load(0, CPU)
    assert known.train_labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert new.train_labels.unique().tolist() == [5, 6, 7, 8, 9]
    for digits in (known, new):
        trained, held_out = digits.train_labels.bincount(), digits.test_labels.bincount()
        shares = held_out[held_out > 0] / (trained + held_out)[held_out > 0]
        assert len(shares) == 5
        torch.testing.assert_close(shares, torch.full((5,), 0.25), atol=0.01, rtol=0.0)
    assert [bound.item() for bound in new.train_images.aminmax()] == [-1.0, 1.0]


def test_an_epoch_shows_every_image_once_and_batches_repeat_with_the_seed() -> None:
    _, new = data.load(0, CPU)
    count = len(new.train_labels)
    whole = torch.cat([images for images, _ in new.batches(32, count // 32, 5)])
    assert len(whole.flatten(1).unique(dim=0)) == count // 32 * 32
    again = torch.cat([images for images, _ in new.batches(32, count // 32, 5)])
    other = torch.cat([images for images, _ in new.batches(32, count // 32, 6)])
    assert torch.equal(whole, again)
    assert not torch.equal(whole, other)


def test_eager_lora_is_what_peft_computes() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    eager = methods.EagerLoRALinear(base, Options(rank=4, alpha=6.0, dropout=0.0))
    nn.init.normal_(eager.lora_B)
    wrapped = nn.Sequential(nn.Linear(24, 16))
    wrapped[0].load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=["0"])
    theirs = peft.get_peft_model(wrapped, config).base_model.model[0]
    theirs.lora_A["default"].weight.data.copy_(eager.lora_A.data)
    theirs.lora_B["default"].weight.data.copy_(eager.lora_B.data)
    x = torch.randn(3, 5, 24)
    assert torch.equal(eager(x), theirs(x))


# LoRA: two tensors in six layers; the adapter: four in two; the prompt: one; the prefix: two in one
# attention; the head's two.
COUNTS = [(LORA, 6 * 2 + 2), (ADAPTER, 2 * 4 + 2), (PROMPT, 1 + 2), (PREFIX, 2 + 2)]
METHODS = pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)


@pytest.mark.parametrize(("method", "count"), COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pair_starts_in_one_state_and_trains_adapter_and_head_only(
    dtype: torch.dtype, method: Method, count: int
) -> None:
    frozen = small_frozen_model(dtype)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    eager, fused = methods.build_pair(frozen, method, Options(4, 8.0, 0.0))
    trained = methods.trained_tensors(eager)
    assert set(trained) == set(methods.trained_tensors(fused))
    assert len(trained) == count
    for name, tensor in methods.trained_tensors(fused).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, trained[name])
    _, new = data.load(0, CPU)
    train.adapt(eager, fused, new, 3, 0, lambda steps: None)
    for model in (eager, fused):
        after, moved = model.state_dict(), set()
        # Behind an adapter the layer is one level deeper.
        after = {name.replace(".module.", "."): value for name, value in after.items()}
        for name, value in before.items():
            if not torch.equal(value, after[name]):
                moved.add(name)
        assert moved == {"head.weight", "head.bias"}
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


@METHODS
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_same_seed_trains_the_same(dropout: float, method: Method) -> None:
    _, new = data.load(0, CPU)

    def losses() -> list[float]:
        torch.manual_seed(3)
        pair = methods.build_pair(small_frozen_model(), method, Options(4, 8.0, dropout))
        by_eager, by_fused = train.adapt(*pair, new, 4, 0, lambda steps: None)
        return by_eager.losses + by_fused.losses

    assert losses() == losses()


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    layer = nn.Linear(8, 3)
    # Needs a gradient, so that the weight is saved as well.
    x = torch.randn(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        # Saved: x for the weight's gradient, and y (exp's result and a view of it, one storage).
        y = layer(x).exp()
        return (y * y.view(4, 3)).sum()

    assert measure.saved_bytes(layer, forward) == 4 * (4 * 8 + 4 * 3)


def test_median_leaves_out_the_steps_of_warming_up() -> None:
    assert measure.median_ms([90.0] * measure.WARM_UP_STEPS + [1.0, 3.0, 2.0]) == 2.0
    assert measure.median_ms([7.0]) == 7.0


def test_time_is_that_of_the_step() -> None:
    def step() -> float:
        time.sleep(0.02)
        return 5.0

    result, time_ms = measure.timed_ms(step, CPU)
    assert result == 5.0
    assert time_ms >= 20.0


def adapted(frozen: DigitTransformer, method: Method = LORA) -> DigitTransformer:
    _, fused = methods.build_pair(frozen, method, Options(4, 8.0, 0.0))
    for tensor in methods.trained_tensors(fused).values():
        nn.init.normal_(tensor)
    return fused


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_adapter_gives_the_same_logits(
    tmp_path: Path, dtype: torch.dtype, method: Method
) -> None:
    frozen, path = small_frozen_model(dtype), tmp_path / "adapter.safetensors"
    model = adapted(frozen, method)
    adapter_file.save(path, model, method, Options(4, 8.0, 0.0))
    reloaded = adapter_file.load(path, frozen, method)
    images = torch.randn(5, 8, 8)
    assert torch.equal(reloaded.eval()(images), model.eval()(images))
    assert not torch.equal(reloaded(images), frozen(images))


def test_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    adapter_file.save(path, adapted(small_frozen_model()), LORA, Options(4, 8.0, 0.0))
    deeper = DigitTransformer(width=32, heads=2, depth=2)
    freeze(deeper, torch.float32)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.k\.lora_A"):
        adapter_file.load(path, deeper, LORA)
    other = methods.Method("Other", LORA.apply_eager, LORA.apply_fused, LORA.explain)
    with pytest.raises(ValueError, match="holds LoRA, not Other"):
        adapter_file.load(path, small_frozen_model(), other)


def test_a_reloaded_adapter_that_scores_otherwise_fails_the_demo(tmp_path: Path) -> None:
    frozen, path = small_frozen_model(), tmp_path / "lora.safetensors"
    adapter_file.save(path, adapted(frozen), LORA, Options(4, 8.0, 0.0))
    _, new = data.load(0, CPU)
    right = train.accuracy(adapted(frozen), new)
    with pytest.raises(story.DemoFailed, match="reloaded scores"):
        story._rescore(path, frozen, LORA, new, right + 0.25)


def row(**changed: Any) -> report.Row:
    figures: dict[str, Any] = {
        "name": "LoRA", "dropout": 0.0, "trainable_share": 0.05, "accuracy_before": 0.1,
        "accuracy_eager": 0.9, "accuracy_fused": 0.9, "ms_per_step_eager": 2.0,
        "ms_per_step_fused": 1.0, "saved_bytes_eager": 4, "saved_bytes_fused": 2,
        "largest_loss_difference": 1e-6, "losses_eager": [1.0], "losses_fused": [1.0],
    }  # fmt: skip
    return report.Row(**{**figures, **changed})


@pytest.mark.parametrize("form", ["accuracy_eager", "accuracy_fused"])
def test_a_method_that_learned_nothing_fails_the_demo(form: str) -> None:
    story._check_learned([row()])
    with pytest.raises(story.DemoFailed, match="not above 10.0%"):
        story._check_learned([row(), row(**{form: 0.1})])


def test_the_reference_is_called_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    served = story._served(small_frozen_model(), LORA, small_settings())
    story._say(served)
    captured = capsys.readouterr()
    assert "lora_linear of 6 layers ran on reference" in captured.out
    assert "WARNING: no fused kernel served 6 layers" in captured.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_prompt_give_the_same_logits_and_gradients(dtype: torch.dtype) -> None:
    pair = methods.build_pair(small_frozen_model(dtype), PROMPT, Options(3, 6.0, 0.0))
    images = torch.randn(5, 8, 8)
    eager, fused = (model(images) for model in pair)
    assert torch.equal(eager, fused)
    gradients = []
    for model, logits in zip(pair, (eager, fused), strict=True):
        logits.square().sum().backward()
        gradients.append(model.prompt.get_parameter("prompt").grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_prefix_give_the_same_logits_and_gradients(dtype: torch.dtype) -> None:
    pair = methods.build_pair(small_frozen_model(dtype), PREFIX, Options(3, 6.0, 0.0))
    images = torch.randn(5, 8, 8)
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {}
    found = []
    for model in pair:
        logits = model(images)
        logits.square().mean().backward()
        names = ("blocks.0.attention.prefix_key", "blocks.0.attention.prefix_value")
        found.append([logits, *(model.get_parameter(name).grad for name in names)])
    for eager, fused in zip(*found, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(fused, eager, **tolerance)


def test_prompt_tuning_has_no_second_run_with_dropout() -> None:
    settings = small_settings()
    assert [each.dropout for each in story._variants(settings, LORA)] == [0.0, 0.1]
    assert [each.dropout for each in story._variants(settings, PROMPT)] == [0.0]


def _failing(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail
