"""Provokes what the page says under "Installing" and "Which backend runs"."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cuda_build
import pytest
import torch

from peft_kernels import __main__ as command_line
from peft_kernels import explain, lora_linear
from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, extension, triton_runtime
from peft_kernels.lora.dispatch import LORA_LINEAR, LoRASpec
from tests.docs.provoked import provokes

ROOT = Path(__file__).resolve().parent.parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def _tensors() -> list[torch.Tensor]:
    return [torch.ones(shape) for shape in ((4, 8), (6, 8), (2, 8), (6, 2))]


def _import_raises(patch: pytest.MonkeyPatch, error: Exception) -> str | None:
    def refuse(name: str) -> ModuleType:
        raise error

    patch.setattr(extension, "importlib", SimpleNamespace(import_module=refuse))
    return extension.why_not()


@provokes("the C++ extension is not built (a pure-Python install)")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    return _import_raises(patch, ModuleNotFoundError("peft_kernels._C"))


@provokes("the C++ extension does not load (…)")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    return _import_raises(patch, ImportError("undefined symbol: aoti_torch_mm"))


@provokes("the C++ extension is of version …, the package of …")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    old = ModuleType("peft_kernels._C")
    old.build_info = lambda: {"version": "0.0.9"}  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "peft_kernels._C", old)
    return extension.why_not()


@provokes("the CUDA library is not built: install the CUDA toolkit (nvcc)")
def _(patch: pytest.MonkeyPatch, folder: Path) -> str | None:
    patch.setattr(cuda_library, "PATH", folder / "_C_cuda.so")
    return cuda_library.why_not_loaded()


@provokes("the CUDA library is of version …, the package of …")
def _(patch: pytest.MonkeyPatch, folder: Path) -> str | None:
    (folder / "_C_cuda.so").write_bytes(
        b"<peft_kernels CUDA library|version=0.0.9|torch=2.13.0|cuda=13.0|cuda_archs=80|compiler=g>"
    )
    patch.setattr(cuda_library, "PATH", folder / "_C_cuda.so")
    return cuda_library.why_not_loaded()


@provokes("PEFT_KERNELS_BUILD must be one of auto, none, cpu, cuda, got …")
def _(_: pytest.MonkeyPatch, folder: Path) -> str | None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        env=os.environ | {"PEFT_KERNELS_BUILD": "fast"}, capture_output=True, text=True, cwd=folder,
        timeout=60, check=False,
    )  # fmt: skip
    return done.stderr


@provokes("PEFT_KERNELS_CUDA_ARCHS names …; nvcc … compiles for …")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    def answer(nvcc: str, option: str) -> str:
        return "release 13.0" if option == "--version" else "sm_80\nsm_90\n"

    patch.setattr(cuda_build, "_ask", answer)
    patch.setenv("PEFT_KERNELS_CUDA_ARCHS", "70")
    cuda_build.architectures("nvcc")
    return None


@provokes("nvcc not found in …: install the CUDA toolkit or set CUDA_HOME")
def _(patch: pytest.MonkeyPatch, folder: Path) -> str | None:
    patch.setenv("CUDA_HOME", str(folder))
    cuda_build.find_nvcc()
    return None


@provokes("bench: the benchmarks live in the source tree")
def _(patch: pytest.MonkeyPatch, folder: Path) -> str | None:
    patch.setattr(command_line, "__file__", str(folder / "peft_kernels" / "__main__.py"))
    said: list[str] = []
    patch.setattr(sys, "stderr", SimpleNamespace(write=said.append, flush=lambda: None))
    command_line.main(["bench"])
    return "".join(said)


@provokes("…: backend … was demanded and cannot serve this call.")
def _(_: pytest.MonkeyPatch, __: Path) -> str | None:
    lora_linear(*_tensors(), backend="cuda")
    return None


@provokes("PEFT_KERNELS_BACKEND must be one of triton, cuda, cpp, reference, got …")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    patch.setenv("PEFT_KERNELS_BACKEND", "fastest")
    lora_linear(*_tensors())
    return None


@provokes("backend must be one of triton, cuda, cpp, reference or None, got …")
def _(_: pytest.MonkeyPatch, __: Path) -> str | None:
    lora_linear(*_tensors(), backend="fastest")
    return None


def _on_a_gpu_without_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton_runtime, "import_problem", lambda: "Triton is not installed")
    patch.setattr(cuda_library, "why_not", lambda device, dtype: "the CUDA library is not built")
    backends.forget_choices()
    backends.select(LORA_LINEAR, LoRASpec(GPU, torch.float64, 4, 8, 6, 2, False))


@provokes("… runs on the plain PyTorch reference: …")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _on_a_gpu_without_kernels(patch)
    return str(caught[0].message)


@provokes("… (PEFT_KERNELS_STRICT=1 forbids falling back)")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    patch.setenv("PEFT_KERNELS_STRICT", "1")
    _on_a_gpu_without_kernels(patch)
    return None


@provokes("Triton is not installed: pip install triton (Linux), or use another backend")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    patch.setattr(importlib.util, "find_spec", lambda name: None)
    return triton_runtime.why_not(CPU, torch.float32)


@provokes("CPU tensors need TRITON_INTERPRET=1, set before Triton is imported")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    patch.delenv("TRITON_INTERPRET", raising=False)
    return triton_runtime.why_not(CPU, torch.float32)


@provokes("TRITON_INTERPRET=1 is set: unset it to run compiled kernels on the GPU")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    patch.setenv("TRITON_INTERPRET", "1")
    return triton_runtime.why_not(GPU, torch.bfloat16)


@provokes("needs compute capability 8.0 (Ampere) or later")
def _(patch: pytest.MonkeyPatch, _: Path) -> str | None:
    patch.delenv("TRITON_INTERPRET", raising=False)
    patch.setattr(triton_runtime, "capability", lambda index: (7, 5))
    return triton_runtime.why_not(GPU, torch.bfloat16)


@provokes("float64 has no tensor-core kernel: use float32 or a 16-bit dtype")
def _(_: pytest.MonkeyPatch, __: Path) -> str | None:
    return explain(lora_linear, *(each.double() for each in _tensors())).reasons["triton"]


@provokes("serves float32 and bfloat16: cast float16 to one")
def _(_: pytest.MonkeyPatch, __: Path) -> str | None:
    return explain(lora_linear, *(each.half() for each in _tensors())).reasons["cpp"]


@provokes("explain knows …; got …")
def _(_: pytest.MonkeyPatch, __: Path) -> str | None:
    explain(torch.nn.Linear(2, 2), torch.ones(2))
    return None
