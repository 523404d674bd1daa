"""The demo from outside: what it writes, what it says, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from safetensors import safe_open

from peft_kernels.core import extension
from peft_kernels.demo import main as demo
from peft_kernels.demo import story
from tests.demo.conftest import QuickRun, command, environment

FILES = [
    "adapter.safetensors",
    "lora.safetensors",
    "prefix.safetensors",
    "prompt.safetensors",
]
WRITTEN = sorted(["demo.json", "demo.png", *FILES])


@pytest.fixture(scope="module")
def summary(quick: QuickRun) -> dict[str, Any]:
    return json.loads((quick.out / "demo.json").read_text())


def test_ends_well_and_leaves_its_files_alone(quick: QuickRun) -> None:
    assert quick.finished.returncode == 0, quick.finished.stderr
    assert sorted(os.listdir(quick.out)) == WRITTEN
    assert "Traceback" not in quick.finished.stderr


def test_table_has_a_line_per_row_and_fits_a_terminal(
    quick: QuickRun, summary: dict[str, Any]
) -> None:
    lines = quick.finished.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    for row in summary["rows"]:
        (line,) = (each for each in lines if each.startswith(row["name"] + "  "))
        assert f"{row['accuracy_fused']:.1%}" in line
        assert f"{row['ms_per_step_fused']:.1f}" in line
        assert f"{row['saved_bytes_fused'] / 2**20:.2f}" in line


def test_adapting_learns_the_new_digits_in_both_forms(summary: dict[str, Any]) -> None:
    named = [(row["name"], row["dropout"]) for row in summary["rows"]]
    assert named == [
        ("LoRA", 0.0),
        ("LoRA, dropout 0.1", 0.1),
        ("Adapter", 0.0),
        ("Adapter, dropout 0.1", 0.1),
        ("Prompt", 0.0),
        ("Prefix", 0.0),
    ]
    for row in summary["rows"]:
        assert 0.0 <= row["accuracy_before"] < row["accuracy_eager"] <= 1.0
        assert row["accuracy_before"] < row["accuracy_fused"] <= 1.0
        assert row["losses_fused"][-1] < row["losses_fused"][0]
        assert 0.0 < row["trainable_share"] < 0.1


def test_fused_losses_are_the_eager_ones_to_rounding(summary: dict[str, Any]) -> None:
    for row in summary["rows"]:
        if row["dropout"]:
            assert row["largest_loss_difference"] is None
            continue
        assert len(row["losses_fused"]) == summary["settings"]["steps"]
        pairs = zip(row["losses_eager"], row["losses_fused"], strict=True)
        largest = max(abs(eager - fused) for eager, fused in pairs)
        assert largest == row["largest_loss_difference"]
        # Ten rounding units of float32 at the first loss, about 8. A scaling off by 1 % exceeds it.
        assert largest <= 1e-5


# LoRA has dropout on x in 18 layers, the adapter on y in 6: less of the model's bytes.
@pytest.mark.parametrize(("name", "most", "layers"), [("LoRA", 0.75, 18), ("Adapter", 0.85, 6)])
def test_fused_saves_fewer_bytes_under_dropout(
    summary: dict[str, Any], name: str, most: float, layers: int
) -> None:
    rows = {row["name"]: row for row in summary["rows"]}
    without, with_dropout = rows[name], rows[f"{name}, dropout 0.1"]
    assert with_dropout["saved_bytes_fused"] < most * with_dropout["saved_bytes_eager"]
    # The mask is made again from its seed, 8 bytes in each of the layers.
    grown = with_dropout["saved_bytes_fused"] - without["saved_bytes_fused"]
    assert 0 <= grown <= layers * 8


def test_fused_never_saves_more_bytes(summary: dict[str, Any]) -> None:
    for row in summary["rows"]:
        assert 0 < row["saved_bytes_fused"] <= row["saved_bytes_eager"]


def test_summary_names_settings_versions_times_and_the_backend(
    quick: QuickRun, summary: dict[str, Any]
) -> None:
    assert summary["settings"]["seed"] == 0
    assert summary["settings"]["alpha"] == 2 * summary["settings"]["rank"]
    assert {"torch", "peft_kernels", "safetensors"} <= set(summary["machine"]["versions"])
    for row in summary["rows"]:
        assert row["ms_per_step_eager"] > 0
        assert row["ms_per_step_fused"] > 0
    assert [(each["method"], each["layers"]) for each in summary["served"]] == [
        ("LoRA", 18),
        ("Adapter", 6),
        ("Prompt", 1),
        ("Prefix", 3),
    ]
    for served in summary["served"]:
        assert served["backend"] == ("cpp" if extension.why_not() is None else "reference")
        assert f"ran on {served['backend']}" in quick.finished.stdout
        assert ("WARNING" in quick.finished.stderr) == (served["backend"] == "reference")


def test_adapter_file_holds_the_trained_tensors_and_scores_the_same(
    quick: QuickRun, summary: dict[str, Any]
) -> None:
    lora, bottleneck, prompt, prefix = summary["adapters"]
    scored = {row["name"]: row["accuracy_fused"] for row in summary["rows"]}
    named = ("LoRA", "Adapter", "Prompt", "Prefix")
    for each, name in zip((lora, bottleneck, prompt, prefix), named, strict=True):
        assert each["accuracy_reloaded"] == each["accuracy_trained"] == scored[name]
    with safe_open(quick.out / prompt["file"], framework="pt") as file:
        assert set(file.keys()) == {"prompt.prompt", "head.weight", "head.bias"}
        assert list(file.get_tensor("prompt.prompt").shape) == [8, 192]
    with safe_open(quick.out / prefix["file"], framework="pt") as file:
        assert len(set(file.keys())) == 3 * 2 + 2
        assert list(file.get_tensor("blocks.2.attention.prefix_value").shape) == [4, 8, 48]
    with safe_open(quick.out / lora["file"], framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        shape = file.get_tensor("blocks.0.attention.q.lora_A").shape
        assert file.get_tensor("blocks.0.attention.q.lora_B").abs().max() > 0
    assert (metadata["method"], metadata["r"], metadata["alpha"]) == ("LoRA", "8", "16.0")
    assert list(shape) == [8, 192]
    assert len(names) == 18 * 2 + 2
    head = {"head.weight", "head.bias"}
    assert head < names
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in names - head)


def test_figure_is_a_png_with_something_on_it(quick: QuickRun) -> None:
    pixels = matplotlib.image.imread(quick.out / "demo.png")
    assert min(pixels.shape[:2]) >= 500
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_cleanly_and_leaves_old_files_as_they_were(
    tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "demo"
    old = {name: f"old {name}" for name in WRITTEN}
    out.mkdir()
    for name, text in old.items():
        (out / name).write_text(text)
    with subprocess.Popen(
        command("--quick", "--device", "cpu", "--steps", "1000000", "--out", str(out)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(4)
        assert process.poll() is None
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert number.name in errors
    assert "Traceback" not in output + errors
    assert {path.name: path.read_text() for path in out.iterdir()} == old


def test_missing_package_is_named_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert demo.main(["--quick"]) == 2
    assert capsys.readouterr().err == (
        "demo: scikit-learn cannot be imported; "
        "to install what the demo needs: pip install peft_kernels[demo]\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--dropout", "1"],
        ["--dropout", "much"],
        ["--steps", "0"],
        ["--rank", "-1"],
        ["--seed", str(2**32)],
        ["--dtype", "float16"],
        ["--speed", "high"],
    ],
    ids=" ".join,
)
def test_bad_option_ends_with_its_name(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", ""])
def test_device_that_is_not_there_ends_before_training(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--device", device, "--out", str(tmp_path / "demo")]) == 2
    assert "--device" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("name", ["cuda", "magic"])
def test_demanded_backend_that_cannot_serve_ends_before_training(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr(story.train, "pretrain", never)
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", name)
    assert demo.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err


def test_folder_that_cannot_be_made_ends_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    assert demo.main(["--device", "cpu", "--out", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err


def test_a_demo_that_failed_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: object) -> None:
        raise story.DemoFailed("nothing learned")

    monkeypatch.setattr(story, "tell", fail)
    assert demo.main(["--device", "cpu"]) == 1
    assert "nothing learned" in capsys.readouterr().err
