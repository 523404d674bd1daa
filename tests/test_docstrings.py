"""The examples in the documentation run, on a CPU, as printed."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import peft_kernels

PUBLIC = [name for name in peft_kernels.__all__ if name != "__version__"]
MODULES = sorted({inspect.getmodule(getattr(peft_kernels, name)).__name__ for name in PUBLIC})


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    documented = inspect.getdoc(getattr(peft_kernels, name)) or ""
    # More than the signature that a dataclass or an exception gets by itself.
    assert not documented.startswith(f"{name}(")
    assert len(documented.split()) > 5


def test_functions_and_layers_show_an_example() -> None:
    shown = [name for name in PUBLIC if "Example" in (getattr(peft_kernels, name).__doc__ or "")]
    assert {"LoRALinear", "explain", "lora_linear", "replace"} <= set(shown)
