"""The CUDA library ``_C_cuda.so``: read, checked and loaded once, refused when it does not fit.

It is no Python module, and a torch without CUDA cannot load it. What it is stands in it as text, so
that a library of another version, or for other GPUs, is refused before anything of it runs.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from peft_kernels.core.backend import Backend, forget_choices
from peft_kernels.version import __version__

PATH = Path(__file__).parent.parent / "_C_cuda.so"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TEXT = re.compile(rb"<peft_kernels CUDA library((?:\|[a-z_]+=[^|<>\x00]*)+)>")
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def _rebuild(variables: str = "") -> str:
    build = f"{variables}PEFT_KERNELS_BUILD=cuda"
    return (
        f"{build} pip install --no-build-isolation --force-reinstall --no-deps peft_kernels "
        f"(in a source tree: {build} python setup.py build_ext --inplace)"
    )


@functools.cache
def build_info() -> dict[str, Any] | None:
    """Return what the library was built with, or None where there is none, without loading it.

    Keys: version, torch, cuda, cuda_archs (["80", "90a"]), compiler. Empty where the file says
    nothing of it.
    """
    try:
        with open(PATH, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            found = _TEXT.search(text)
            pairs = found[1].decode().split("|")[1:] if found else []
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # unreadable, or empty
        return {}
    info: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
    return info | ({"cuda_archs": info["cuda_archs"].split()} if "cuda_archs" in info else {})


@functools.cache
def _unfit() -> str | None:
    """Return why the file cannot be used by this package and this torch, or None."""
    info = build_info()
    if info is None:
        return (
            "the CUDA library is not built: install the CUDA toolkit (nvcc), a compiler, torch, "
            f"ninja and pybind11, then {_rebuild()}"
        )
    if not info.get("cuda_archs"):
        return f"{PATH} is damaged or no library of peft_kernels: {_rebuild()}"
    if info.get("version") != __version__:
        return (
            f"the CUDA library is of version {info.get('version')}, the package of {__version__}: "
            f"{_rebuild()}"
        )
    if torch.version.hip:
        return "serves NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return (
            "torch finds no NVIDIA GPU: check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        )
    return None


def serves(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether code for ``arch`` ("86", "90a") runs on a GPU of this capability.

    Within a generation a GPU runs what was built for an earlier one; an accelerated form, whose
    name ends in a letter, runs on its own alone.
    """
    major, minor = int(arch.rstrip("af")[:-1]), int(arch.rstrip("af")[-1])
    if arch.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


@functools.cache
def _wrong_gpu(index: int) -> str | None:
    """Return why no code in the library runs on CUDA device ``index``, or None."""
    archs = (build_info() or {})["cuda_archs"]
    capability = torch.cuda.get_device_capability(index)
    if any(serves(arch, capability) for arch in archs):
        return None
    number = f"{capability[0]}{capability[1]}"
    if capability < (7, 5):
        return f"needs compute capability 7.5 (Turing) or later, this GPU is sm_{number}"
    built = ", ".join(f"sm_{arch}" for arch in archs)
    oldest = min(int(arch.rstrip("af")) for arch in archs)
    how = "older than what" if int(number) < oldest else "not among what"
    wanted = ";".join([*archs, "90a" if number == "90" else number])
    return f"this GPU is sm_{number}, {how} the CUDA library was built for ({built}): " + _rebuild(
        f"PEFT_KERNELS_CUDA_ARCHS='{wanted}' "
    )


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str | None]:
    """Load the library, which registers its ops; return it, or the reason against it."""
    try:
        torch.ops.load_library(PATH)
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        # torch says that it could not; the loader, why.
        return None, f"the CUDA library does not load ({error.__cause__ or error}): {_rebuild()}"
    built, driver = (build_info() or {})["cuda"], library.peft_kernels_cuda_driver()
    if not driver:
        return None, "the CUDA library finds no NVIDIA driver: install it, check with nvidia-smi"
    # A driver serves every toolkit of its own generation, and of earlier ones.
    if driver // 1000 < int(built.split(".")[0]):
        return None, (
            f"the CUDA library was built with CUDA {built}, the NVIDIA driver knows CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}: update the driver, or build with an earlier "
            f"toolkit (CUDA_HOME): {_rebuild()}"
        )
    return library, None


# What the tests run in its place: the same sources, compiled for the CPU.
_emulated: ctypes.CDLL | None = None


def emulate(path: Path | None) -> None:
    """Run ``backend="cuda"`` on CPU tensors by a library of tests/cuda_emulation; None ends it."""
    global _emulated
    if path is not None:
        torch.ops.load_library(path)
    _emulated = None if path is None else ctypes.CDLL(str(path))
    forget()


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the library cannot serve tensors of this device and dtype, or None."""
    if dtype not in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"serves float32, float16 and bfloat16: cast {name} to one"
    if device.type == "cpu":
        return None if _emulated else "serves NVIDIA GPUs: move the tensors to one"
    return _unfit() or _wrong_gpu(device.index or 0) or _open()[1]


def forget() -> None:
    """Forget what was found out about the file and the GPUs, as after a rebuild."""
    for found in (build_info, _unfit, _wrong_gpu, _open, _op):
        found.cache_clear()
    forget_choices()


def why_not_loaded() -> str | None:
    """Return the reason why the library cannot be loaded here, whatever the GPU, or None."""
    return _unfit() or _open()[1]


def backend(launchers: ModuleType) -> Backend:
    """Return the backend "cuda" of a method.

    Args:
        launchers: the method's ``cuda`` module: ``forward``, ``backward`` and, where it has limits
            of its own, ``why_not(spec)``.
    """
    limits: Callable[[Any], str | None] | None = getattr(launchers, "why_not", None)

    def reason(spec: Any) -> str | None:
        found = why_not(spec.device, spec.dtype)
        return found or (limits(spec) if limits else None)

    return Backend("cuda", launchers.forward, launchers.backward, reason)


def _library() -> ctypes.CDLL:
    if _emulated:
        return _emulated
    reason = why_not_loaded()
    if reason:
        raise ImportError(reason)
    library, _ = _open()
    assert library is not None
    return library


@functools.cache
def _op(name: str) -> Callable[..., int]:
    _library()
    op: Callable[..., int] = getattr(torch.ops.peft_kernels_cuda, name).default
    return op


def call(name: str, *args: Any) -> None:
    """Run the op ``peft_kernels_cuda::name``, which launches kernels.

    Raises:
        torch.OutOfMemoryError: a launch found no memory; the process can go on.
        RuntimeError: another failed launch, with the kernel's name and CUDA's text.
        ImportError: the library cannot be used, with the reason and the way out.
    """
    status = _op(name)(*args)
    if status:
        text = _library().peft_kernels_cuda_error
        text.restype = ctypes.c_char_p
        error = torch.OutOfMemoryError if status == _OUT_OF_MEMORY else RuntimeError
        raise error(text().decode())
