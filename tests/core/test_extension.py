"""The compiled module `_C`: what is refused, in words that say what to change."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import peft_kernels
from peft_kernels import BackendUnavailable, explain, lora_linear
from peft_kernels.core import backend as backends
from peft_kernels.core import extension
from peft_kernels.core.backend import Explanation

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps peft_kernels"
IN_TREE = "(in a source tree: python setup.py build_ext --inplace)"


def forget() -> None:
    extension._import.cache_clear()
    extension.load.cache_clear()
    backends.forget_choices()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `_C` be looked for again, in the test and after it."""
    forget()
    yield
    monkeypatch.undo()
    forget()


def call() -> tuple[Explanation, BackendUnavailable]:
    """Return what a call on the CPU is told, and what it raises where it demands `_C`."""
    tensors = [torch.ones(shape) for shape in ((4, 8), (6, 8), (2, 8), (6, 2))]
    assert torch.equal(lora_linear(*tensors), torch.full((4, 6), 24.0))  # goes on without
    with pytest.raises(BackendUnavailable) as raised:
        lora_linear(*tensors, backend="cpp")
    return explain(lora_linear, *tensors), raised.value


def test_another_version_is_refused_with_the_reinstall_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = ModuleType("peft_kernels._C")
    old.build_info = lambda: {"version": "0.0.9"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft_kernels._C", old)
    reason = (
        f"the C++ extension is of version 0.0.9, the package of {peft_kernels.__version__}: "
        f"{REINSTALL} {IN_TREE}"
    )
    told, raised = call()
    assert told.backend == "reference" and told.reasons["cpp"] == reason
    assert f"cpp: {reason}" in str(raised)
    assert extension.build_info() is None
    with pytest.raises(ImportError, match=r"of version 0\.0\.9"):
        extension.load()


def test_one_that_does_not_load_says_what_the_loader_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suffix = Path(extension.load().__file__ or "").name.partition(".")[2]
    forget()
    (tmp_path / f"_C.{suffix}").write_bytes(b"\x7fELF")
    monkeypatch.delitem(sys.modules, "peft_kernels._C")
    monkeypatch.setattr(peft_kernels, "__path__", [str(tmp_path)])
    told, raised = call()
    reason = told.reasons["cpp"]
    assert "does not load" in reason and "file too short" in reason
    assert REINSTALL in reason and IN_TREE in reason and reason in str(raised)


def test_none_is_told_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft_kernels._C", None)  # what there is not
    told, raised = call()
    reason = told.reasons["cpp"]
    assert "is not built (a pure-Python install): install a compiler" in reason
    assert REINSTALL in reason and IN_TREE in reason and reason in str(raised)
