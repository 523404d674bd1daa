"""The examples of training loops as users run them, a few steps each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import ROOT, python

for each in ("accelerate", "peft", "transformers"):
    pytest.importorskip(each)

SMALL = ("--batch", "4", "--length", "32", "--rank", "4")


def run(name: str, *options: str) -> str:
    done = python(str(ROOT / "examples" / name), *SMALL, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(each) for each in re.findall(r"loss'?:? '?(\d+\.\d+)", output)]


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "bf16", "--checkpoint", "saved"),
        ("--precision", "fp16", "--checkpoint", "reentrant", "--accumulate", "2"),
        ("--compile",),
    ],
    ids=lambda options: " ".join(options),
)
def test_plain_pytorch(options: tuple[str, ...]) -> None:
    plain = losses(run("finetune_pytorch.py", "--steps", "6", *options))
    assert len(plain) == 6 and plain[-1] < plain[0] - 0.05


@pytest.mark.parametrize(
    "options",
    [("--gradient-checkpointing", "--accumulate", "2"), ("--bf16",)],
    ids=lambda options: " ".join(options),
)
def test_trainer_trains_as_with_pefts_layers(options: tuple[str, ...], tmp_path: Path) -> None:
    from peft import PeftConfig

    folder = str(tmp_path / "adapter")
    common = ("--steps", "10", "--dropout", "0", "--out", folder, *options)
    output = run("finetune_trainer.py", *common)
    assert "accelerated 14 of 14 layers (lora_linear)" in output
    assert PeftConfig.from_pretrained(folder).r == 4
    eager = run("finetune_trainer.py", *common, "--eager")
    assert "accelerated" not in eager
    found, expected = losses(output), losses(eager)
    assert len(found) == 11 and found[-2] < found[0] - 0.05  # the last is the mean
    tolerance = 2e-2 if "--bf16" in options else 1.1e-3  # printed with four digits
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_accelerate_of_hugging_face_trains_bert(tmp_path: Path) -> None:
    folder = str(tmp_path / "adapter")
    output = run(
        "finetune_accelerate.py", "--steps", "20", "--mixed-precision", "bf16", "--out", folder
    )
    assert "accelerated 13 of 13 layers (lora_linear)" in output
    assert len(losses(output)) == 10
    (score,) = re.findall(r"accuracy on 256 unseen texts: ([\d.]+)", output)
    # Four of five texts document functions.
    assert float(score) > 0.6
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
