"""Backend "cuda" of every public function: who runs on a GPU where Triton cannot.

The tensors are torch's fake ones and the GPU is pretended, so that the public functions choose by
what they see of real calls; nothing is launched.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels
from peft_kernels import (
    adapter,
    adapter_grouped,
    explain,
    lora_linear,
    prefix_attention,
    prompt_embedding,
)
from peft_kernels.core import cuda_library, triton_runtime

FUNCTIONS = (lora_linear, adapter, adapter_grouped, prefix_attention, prompt_embedding)
EACH = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend a GPU with a library built for it; return a function that makes them others."""

    def pretend(major: int, minor: int, archs: str) -> None:
        (tmp_path / "_C_cuda.so").write_bytes(
            f"<peft_kernels CUDA library|version={peft_kernels.__version__}|torch=2.13.0|cuda=13.0"
            f"|cuda_archs={archs}|compiler=g++ 12.2.0>".encode()
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
        forget()

    def forget() -> None:
        cuda_library.forget()
        triton_runtime.capability.cache_clear()
        triton_runtime.import_problem.cache_clear()

    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "_C_cuda.so")
    monkeypatch.setattr(cuda_library, "_open", functools.cache(lambda: (None, None)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_runtime, "multiprocessors", lambda index: 108)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pretend(8, 0, "75 80")
    yield pretend
    monkeypatch.undo()
    forget()


def told(function: Callable[..., Any], **options: Any) -> Any:
    """Return the explanation of a small call in float16 on the GPU."""
    with FakeTensorMode():

        def of(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=torch.float16)

        def whole(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=torch.int64)

        arguments = {
            lora_linear: lambda: (of(4, 64), of(32, 64), of(8, 64), of(32, 8)),
            adapter: lambda: (of(4, 64), of(8, 64), of(64, 8)),
            adapter_grouped: lambda: (of(4, 64), of(3, 8, 64), of(3, 64, 8), whole(4)),
            prefix_attention: lambda: (*(of(2, 4, 5, 64) for _ in "qkv"), *(of(4, 3, 64),) * 2),
            prompt_embedding: lambda: (whole(2, 5), of(10, 64), of(3, 64)),
        }
        return explain(function, *arguments[function](), **options)


@EACH
def test_triton_comes_first_and_cuda_on_demand(function: Callable[..., Any]) -> None:
    found = told(function)
    assert (found.backend, found.reasons["cuda"]) == ("triton", "triton comes first")
    found = told(function, backend="cuda")
    assert (found.backend, found.reasons["triton"]) == ("cuda", "backend 'cuda' was demanded")


@EACH
def test_the_variable_demands_it_too(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "cuda")
    assert told(function).backend == "cuda"


@EACH
def test_it_runs_where_triton_is_absent(
    function: Callable[..., Any], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "triton" else real(name, *rest),
    )
    gpu(8, 0, "80")
    found = told(function)
    assert found.backend == "cuda"
    assert found.reasons["triton"].startswith("Triton is not installed: pip install triton")


@EACH
def test_it_runs_where_triton_is_broken(
    function: Callable[..., Any], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cuda_library.PATH.parent
    (folder / "triton.py").write_text("raise OSError('libtriton.so is cut off')")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    gpu(8, 0, "80")
    found = told(function)
    assert found.backend == "cuda"
    assert found.reasons["triton"] == (
        "Triton fails to import (OSError: libtriton.so is cut off): reinstall triton"
    )


@EACH
def test_it_runs_on_a_gpu_that_triton_refuses(function: Callable[..., Any], gpu: Any) -> None:
    gpu(7, 5, "75 80")
    found = told(function)
    assert found.backend == "cuda"
    assert found.reasons["triton"] == "needs compute capability 8.0 (Ampere) or later"


@EACH
def test_a_gpu_older_than_the_build_is_named_with_the_rebuild_line(
    function: Callable[..., Any], gpu: Any
) -> None:
    gpu(7, 5, "80 90a")
    found = told(function)
    assert found.backend == "reference"
    assert found.reasons["cuda"].startswith(
        "this GPU is sm_75, older than what the CUDA library was built for (sm_80, sm_90a): "
        "PEFT_KERNELS_CUDA_ARCHS='80;90a;75' PEFT_KERNELS_BUILD=cuda pip install "
    )
    demanded = told(function, backend="cuda")
    assert demanded.backend is None
    assert demanded.reasons["cuda"] == found.reasons["cuda"]
