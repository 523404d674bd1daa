"""``examples/finetune_distributed.py`` as users run it."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import ROOT, python, torchrun

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

EXAMPLE = ROOT / "examples/finetune_distributed.py"
THREADS = ROOT / "tests/distributed/threads.py"
SIZES = ("--steps", "6", "--length", "32", "--batch", "4", "--rank", "4")


def losses(output: str) -> list[float]:
    return [float(each) for each in re.findall(r"step +\d+  loss ([\d.]+)", output)]


def test_every_engine_trains_what_one_process_trains_and_peft_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    exact = (str(EXAMPLE), *SIZES, "--dropout", "0")
    one = python(str(THREADS), *exact, "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    expected = losses(one.stdout)
    assert len(expected) == 6 and expected[-1] < expected[0] - 0.05
    for parallel in ("ddp", "fsdp", "tp"):
        out = str(tmp_path / parallel)
        done = torchrun(2, str(THREADS), *exact, "--parallel", parallel, "--out", out)
        assert done.returncode == 0, done.stderr
        # Printed with four digits.
        torch.testing.assert_close(losses(done.stdout), expected, rtol=0, atol=1.01e-4)
    _check_loads_in_peft(tmp_path / "one", tmp_path / "tp")


def _check_loads_in_peft(one: Path, tensor_parallel: Path) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("finetune_distributed", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    given = argparse.Namespace(model=None, rank=4, dropout=0.0, length=32)
    ours = example.adapted_model(given, torch.device("cpu"))
    ids = torch.arange(64).reshape(2, 32)
    before = ours(input_ids=ids).logits
    prefix, suffix = "base_model.model.", ".weight"
    loaded = load_file(one / "adapter_model.safetensors")
    state = {name.removeprefix(prefix).removesuffix(suffix): each for name, each in loaded.items()}
    assert not ours.load_state_dict(state, strict=False).unexpected_keys
    logits = ours(input_ids=ids).logits
    assert (logits - before).abs().max() > 1e-2

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(ours.config)
    for folder in (one, tensor_parallel):
        theirs = peft.PeftModel.from_pretrained(base, str(folder))
        torch.testing.assert_close(theirs(input_ids=ids).logits, logits, rtol=0, atol=1e-4)
        base = theirs.unload()
