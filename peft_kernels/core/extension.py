"""The compiled module ``_C``: loaded when first asked for, refused when it does not fit."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from peft_kernels.core import cuda_library
from peft_kernels.version import __version__

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps peft_kernels"
_IN_TREE = "in a source tree: python setup.py build_ext --inplace"


@functools.cache
def _import() -> tuple[ModuleType | None, str | None]:
    """Return the module, or the reason against it."""
    try:
        module = importlib.import_module("peft_kernels._C")
    except ModuleNotFoundError:
        return None, (
            "the C++ extension is not built (a pure-Python install): install a compiler, torch, "
            f"ninja and pybind11, then {_REBUILD} ({_IN_TREE})"
        )
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}): {_REBUILD} ({_IN_TREE})"
    built = module.build_info()["version"]
    if built != __version__:
        return None, (
            f"the C++ extension is of version {built}, the package of {__version__}: {_REBUILD} "
            f"({_IN_TREE})"
        )
    return module, None


def why_not() -> str | None:
    """Return the reason why ``_C`` cannot be used, or None."""
    return _import()[1]


def why_not_products(dtype: torch.dtype) -> str | None:
    """Return the reason why ``_C`` cannot make a product in ``dtype``, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"serves float32 and bfloat16: cast {str(dtype).removeprefix('torch.')} to one"
    return why_not()


@functools.cache
def load() -> ModuleType:
    """Return ``_C``.

    Raises:
        ImportError: it cannot be used, with the reason and the way out.
    """
    module, reason = _import()
    if module is None:
        raise ImportError(reason)
    return module


def build_info() -> dict[str, Any] | None:
    """Return what ``_C`` was built with, or None where there is none.

    Keys: version, torch, cuda (None without a CUDA library of this version), cuda_archs, compiler,
    cpu (the vector level that runs here).
    """
    module, _ = _import()
    if module is None:
        return None
    info: dict[str, Any] = module.build_info()
    library = cuda_library.build_info() or {}
    if library.get("version") == info["version"]:
        info |= {"cuda": library["cuda"], "cuda_archs": library["cuda_archs"]}
    return info
