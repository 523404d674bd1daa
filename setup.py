"""Build of the compiled libraries; everything else is in pyproject.toml.

PEFT_KERNELS_BUILD chooses what is compiled:
    auto  what this machine can build and use (the default): `_C` when torch can be imported and
          there is a C++20 compiler, and `_C_cuda` when that torch has CUDA and nvcc is found; else
          nothing
    none  nothing: a pure-Python wheel
    cpu   `_C`, and an error where it cannot be built
    cuda  `_C` and `_C_cuda`, and an error where they cannot be built; any torch serves

PEFT_KERNELS_SANITIZE=1 puts `_C` under AddressSanitizer and UndefinedBehaviorSanitizer, for tests.
PEFT_KERNELS_CUDA_ARCHS, "80;90a", says what GPUs `_C_cuda` is for: those of this machine, else all.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))  # a build frontend runs this file without its folder
import cuda_build  # noqa: E402

CHOICES = ("auto", "none", "cpu", "cuda")
# What costs most to compile is left out: vtables, checks of every pointer beside ASan's own, and
# all but one of the versions of a function for several CPUs, which are one source.
ONE_VERSION = '-DPK_CLONES=__attribute__((target("avx2,fma")))'
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr,null,alignment,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
)
HOW = "pip install torch ninja pybind11, then pip install --no-build-isolation ."


def extension() -> dict[str, Any]:
    """Return what setup() needs to build `_C`, or nothing for a pure-Python wheel."""
    choice = (os.environ.get("PEFT_KERNELS_BUILD") or "auto").lower()
    if choice not in CHOICES:
        raise SystemExit(f"PEFT_KERNELS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "none":
        return say("PEFT_KERNELS_BUILD=none: a pure-Python wheel, without compiled kernels")
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        check_compiler()
    except Exception as error:  # A broken torch raises anything.
        if choice != "auto":
            raise SystemExit(f"PEFT_KERNELS_BUILD={choice}: {error}. {HOW}") from error
        return say(f"no compiled kernels ({error}): a pure-Python wheel. To compile: {HOW}")
    sanitized = os.environ.get("PEFT_KERNELS_SANITIZE") == "1"
    how = ["-O1", "-g1", ONE_VERSION, *SANITIZERS] if sanitized else ["-O3"]
    module = CppExtension(
        "peft_kernels._C",
        files("csrc", "*.cpp") + files("csrc", "cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=files("csrc", "**/*.h"),
        extra_compile_args=[
            "-std=c++20",
            *how,
            "-fvisibility=hidden",
            "-Wno-psabi",
            # The oldest torch whose stable ABI this build uses; it runs on every later one too.
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f'-DPEFT_KERNELS_VERSION="{version()}"',
            f'-DPEFT_KERNELS_BUILT_WITH_TORCH="{torch.__version__}"',
        ],
        extra_link_args=list(SANITIZERS) if sanitized else [],
    )
    why_no_cuda = without_cuda(choice, torch.version.cuda)
    if why_no_cuda:
        say(f"compiling the CPU kernels; no CUDA kernels: {why_no_cuda}")
        return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}
    say("compiling the CPU kernels and the CUDA kernels")
    # What was not asked for by name may fail to compile: the rest is installed, and says so.
    library = Extension("peft_kernels._C_cuda", sources=[], optional=choice == "auto")
    command = cuda_build.built_extension(version(), BuildExtension)
    return {"ext_modules": [module, library], "cmdclass": {"build_ext": command}}


def check_compiler() -> None:
    """Raise OSError where the compiler that torch would run is absent or does not know C++20."""
    compiler = os.environ.get("CXX", "c++")
    command = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(
            command, input="#include <string>\n", capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise OSError(f"the C++ compiler {compiler} does not start: {error.strerror}") from error
    if done.returncode:
        raise OSError(f"the C++ compiler {compiler} does not compile C++20: {done.stderr.strip()}")


def without_cuda(choice: str, cuda_of_torch: str | None) -> str | None:
    """Return why the CUDA library is left out, or None where it is to be built."""
    if choice == "cpu":
        return "PEFT_KERNELS_BUILD=cpu"
    if choice == "auto" and not cuda_of_torch:
        return "this torch has no CUDA (PEFT_KERNELS_BUILD=cuda builds them nevertheless)"
    try:
        cuda_build.architectures(cuda_build.find_nvcc())
        cuda_build.find_ninja()
    except cuda_build.CannotBuild as error:
        if choice == "cuda":
            raise SystemExit(f"PEFT_KERNELS_BUILD=cuda: {error}") from error
        return str(error)
    return None


def files(folder: str, pattern: str) -> list[str]:
    """Return the files of a folder, as setuptools wants them: relative to this one."""
    return sorted(str(each.relative_to(ROOT)) for each in (ROOT / folder).glob(pattern))


def version() -> str:
    """Return the package's version without importing the package."""
    text = (ROOT / "peft_kernels" / "version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]  # type: ignore[index]


def say(text: str) -> dict[str, Any]:
    """Tell the user what is built, and return nothing to build."""
    print(f"peft_kernels: {text}", file=sys.stderr)
    return {}


setup(**extension())
