"""Builds the CUDA library ``peft_kernels/_C_cuda.so``, for setup.py and for the tests of the build.

Every file is compiled by nvcc: csrc/cuda/*.cu, which know no torch, for each architecture, and
csrc/cuda_binding/*.cpp, which know torch's stable ABI alone. So it needs no torch with CUDA: only
libtorch.so is linked, which brings libtorch_cuda where there is one when the library is loaded.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# One for each family that the kernels are tuned for; a cubin serves later minor numbers too.
ARCHITECTURES = ("75", "80", "86", "89", "90a", "100", "120")
# Whose PTX an architecture has to the letter, since the kernels tell apart what comes before 8.0
# alone: the first two thirds of its compilation need not be repeated.
PTX_OF = {"86": "80", "89": "80", "90a": "80", "120": "100"}
_COMMON = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class CannotBuild(Exception):
    """The CUDA library cannot be built here; the text says what to change."""


def find_nvcc() -> str:
    """Return nvcc's path: of CUDA_HOME, else of PATH, else of /usr/local/cuda.

    Raises:
        CannotBuild: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", os.defpath)]
    places += [] if home else ["/usr/local/cuda/bin"]
    for place in places:
        found = shutil.which("nvcc", path=place)
        if found:
            return found
    where = f"CUDA_HOME={home}" if home else "PATH and /usr/local/cuda"
    raise CannotBuild(f"nvcc not found in {where}: install the CUDA toolkit or set CUDA_HOME")


def _ask(nvcc: str, option: str) -> str:
    try:
        done = subprocess.run([nvcc, option], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or getattr(error, "stdout", None) or ""
        raise CannotBuild(f"{nvcc} {option} fails: {error} {output}".strip()) from error
    return done.stdout


def cuda_version(nvcc: str) -> str:
    """Return the toolkit's version, "13.0"."""
    found = re.search(r"release (\d+\.\d+)", _ask(nvcc, "--version"))
    if not found:
        raise CannotBuild(f"{nvcc} --version names no release: not NVIDIA's compiler?")
    return found[1]


def _known(nvcc: str) -> set[str]:
    """Return the architectures that nvcc compiles for; the accelerated forms are not listed."""
    return set(re.findall(r"sm_(\d+)", _ask(nvcc, "--list-gpu-code")))


def architectures(nvcc: str) -> list[str]:
    """Return what to compile for, as nvcc numbers it: ["80", "90a"].

    PEFT_KERNELS_CUDA_ARCHS where it is set ("80;90a", "8.0 9.0a" likewise), else those of the
    visible GPUs, else all of ``ARCHITECTURES`` that this nvcc knows.

    Raises:
        CannotBuild: a name that is none, or one that this nvcc does not compile for.
    """
    known = _known(nvcc)
    chosen = os.environ.get("PEFT_KERNELS_CUDA_ARCHS", "").replace(".", "").lower()
    if not chosen.strip():
        visible = _visible()
        return visible or [each for each in ARCHITECTURES if each.rstrip("a") in known]
    names = [each.removeprefix("sm_") for each in re.split(r"[;,\s]+", chosen) if each]
    for name in names:
        number = re.fullmatch(r"(\d{2,3})[af]?", name)
        if not number or number[1] not in known:
            raise CannotBuild(
                f"PEFT_KERNELS_CUDA_ARCHS names {name!r}; nvcc {cuda_version(nvcc)} compiles for "
                f"{', '.join(sorted(known, key=int))}, separated by semicolons"
            )
    return list(dict.fromkeys(names))


def _visible() -> list[str]:
    """Return the architectures of the GPUs that torch sees here."""
    import torch

    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
    # 9.0 alone has instructions of the accelerated form that are worth having.
    return [f"{major}{minor}" + "a" * ((major, minor) == (9, 0)) for major, minor in capabilities]


def kernel_flags(archs: Sequence[str]) -> list[str]:
    """Return nvcc's options for a file of kernels."""
    targets = [f"-gencode=arch=compute_{PTX_OF.get(each, each)},code=sm_{each}" for each in archs]
    return [*_COMMON, "-Xcompiler", "-Wall", *targets]


def binding_flags(version: str, archs: Sequence[str], cuda: str) -> list[str]:
    """Return nvcc's options for a file of bindings, which carry what this build is."""
    import torch

    includes = Path(torch.__file__).parent / "include"
    return [
        # The headers of csrc/cuda have device functions in them; a binding uses none.
        *("-x", "cu", f"-gencode=arch=compute_{archs[0]},code=sm_{archs[0]}"),
        *_COMMON,
        f"-I{includes}",
        f"-I{includes / 'torch' / 'csrc' / 'api' / 'include'}",
        "-DUSE_CUDA",
        # The oldest torch whose stable ABI this build uses; it runs on every later one too.
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DPEFT_KERNELS_VERSION={version}",
        f"-DPEFT_KERNELS_BUILT_WITH_TORCH={torch.__version__}",
        f"-DPEFT_KERNELS_BUILT_WITH_CUDA={cuda}",
        f"-DPEFT_KERNELS_CUDA_ARCHS={' '.join(archs)}",
    ]


def sources() -> tuple[list[Path], list[Path]]:
    """Return the files of kernels and those of bindings."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return kernels, sorted((ROOT / "csrc" / "cuda_binding").glob("*.cpp"))


def find_ninja() -> str:
    """Return ninja's path: of PATH, else beside this Python.

    Raises:
        CannotBuild: there is none.
    """
    beside = os.path.dirname(sys.executable)
    found = shutil.which("ninja") or shutil.which("ninja", path=beside)
    if not found:
        raise CannotBuild("ninja not found: pip install ninja")
    return found


def _quoted(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def write_ninja(folder: Path, output: Path, nvcc: str, archs: Sequence[str], version: str) -> None:
    """Write the plan of the build into ``folder``: an object for each source, and the library."""
    import torch

    kernels, bindings = sources()
    compiler = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    libraries = Path(torch.__file__).parent / "lib"
    flags = {
        "kernel": kernel_flags(archs),
        "binding": binding_flags(version, archs, cuda_version(nvcc)),
    }
    lines = ["ninja_required_version = 1.5"]
    for name, words in flags.items():
        lines += [
            f"rule {name}",
            f"  command = {_quoted([nvcc, *compiler, *words])} -MD -MF $out.d -c $in -o $out",
            "  description = nvcc $in",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    link = [
        nvcc, *compiler, "-shared", "-cudart", "static", f"-L{libraries}", "-Xlinker",
        "--no-as-needed", "-ltorch",
    ]  # fmt: skip
    lines += ["rule link", f"  command = {_quoted(link[:4])} -o $out $in {_quoted(link[4:])}"]
    objects = []
    for rule, files in (("kernel", kernels), ("binding", bindings)):
        for source in files:
            objects.append(f"{rule}_{source.stem}.o")
            lines.append(f"build {objects[-1]}: {rule} {_escaped(source)}")
    lines.append(f"build {_escaped(output.absolute())}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def _escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def build(output: Path, folder: Path, version: str) -> None:
    """Compile what has changed and link ``output``; objects stay in ``folder``.

    Raises:
        CannotBuild: nvcc or ninja is missing, an architecture is unknown, or a command failed.
    """
    nvcc = find_nvcc()
    output.parent.mkdir(parents=True, exist_ok=True)
    write_ninja(folder, output, nvcc, architectures(nvcc), version)
    jobs = os.environ.get("MAX_JOBS")
    command = [find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    if subprocess.run(command, check=False).returncode:
        raise CannotBuild("the CUDA library did not compile: the compiler's messages stand above")


def built_extension(setup_version: str, base: type[Any]) -> type[Any]:
    """Return the build_ext command ``base`` with the way to build the CUDA library added."""

    class BuildWithCuda(base):  # type: ignore[misc]
        def get_ext_filename(self, name: str) -> str:
            if name.rpartition(".")[2] == "_C_cuda":  # no Python module: no ABI in its name
                return os.path.join(*name.split(".")) + ".so"
            return str(super().get_ext_filename(name))

        def build_extension(self, extension: Any) -> None:
            if extension.name.rpartition(".")[2] != "_C_cuda":
                super().build_extension(extension)
                return
            path = Path(self.get_ext_fullpath(extension.name))
            try:
                build(path, Path(self.build_temp) / "cuda", setup_version)
            except CannotBuild as error:
                if not extension.optional:
                    raise SystemExit(f"peft_kernels: {error}") from error
                path.unlink(missing_ok=True)  # of an earlier build
                print(f"peft_kernels: going on without CUDA kernels: {error}", file=sys.stderr)

    return BuildWithCuda
