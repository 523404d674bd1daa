"""Compiles CUDA sources as host C++, against the emulated device: a shared library or a program.

Objects and results are cached in ``build/cuda_emulation`` under a hash of everything that went into
them, so that a second run of the tests compiles nothing; a lock for each result lets one process
of pytest-xdist compile what the others wait for.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = ROOT / "build" / "cuda_emulation"
COMPILER = os.environ.get("CXX", "g++")
RUNTIME = HERE / "fibers.cpp"

ASCENDING, DESCENDING, RANDOM = 0, 1, 2

# Lines alone of what a debugger wants, and with UBSan no optimisation: most of the time is
# compilation.
SANITIZERS: dict[str | None, list[str]] = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0"],
    "thread": ["-fsanitize=thread", "-g1"],
}


class BuildError(RuntimeError):
    """A compiler's or linker's complaint."""


def library(
    sources: Sequence[Path | str],
    *,
    csrc: Path = ROOT / "csrc",
    flags: Sequence[str] = (),
    torch: bool = False,
) -> Path:
    """Return a shared library of ``sources`` (paths, relative ones in ``csrc``) and the runtime.

    Args:
        sources: .cu and .cpp files.
        csrc: where "cuda/..." headers lie: another folder for changed sources.
        flags: further compiler flags, such as defines.
        torch: compile against the stable ABI and link torch, for ``torch.ops.load_library``.
    """
    return _build(sources, csrc, flags, None, torch, shared=True)


def program(
    sources: Sequence[Path | str],
    *,
    csrc: Path = ROOT / "csrc",
    flags: Sequence[str] = (),
    sanitizer: str | None = None,
) -> Path:
    """Return a program of ``sources``, one of which has ``main``; "address" includes UBSan."""
    return _build(sources, csrc, flags, sanitizer, False, shared=False)


class Emulation:
    """The controls of a loaded library: who runs next, what was launched, what went wrong."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.pk_emulation_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.library.pk_emulation_last_error.restype = ctypes.c_char_p
        self.library.pk_emulation_launched.restype = ctypes.c_char_p

    def order(self, order: int, seed: int = 0) -> None:
        """Run threads and blocks in ASCENDING, DESCENDING or RANDOM order from now on."""
        self.library.pk_emulation_order(order, seed)

    def resident(self, blocks: int) -> None:
        """Run so many blocks at once; 0 chooses by their size."""
        self.library.pk_emulation_resident(blocks)

    def shared_bytes(self, most: int) -> None:
        """Refuse a launch with more shared memory from now on, as a smaller GPU does."""
        self.library.pk_emulation_shared_bytes(most)

    def launches_with_memory(self, launches: int) -> None:
        """Let so many launches from now on find memory, and none after them; -1: every one."""
        self.library.pk_emulation_launches_with_memory(launches)

    def launched(self) -> list[str]:
        """Return the names of the kernels launched since the last call."""
        return self.library.pk_emulation_launched().decode().split()

    def last_error(self) -> str:
        """Return the text of the last launch that failed."""
        return self.library.pk_emulation_last_error().decode()


def _build(
    sources: Sequence[Path | str],
    csrc: Path,
    flags: Sequence[str],
    sanitizer: str | None,
    torch: bool,
    *,
    shared: bool,
) -> Path:
    paths = [RUNTIME, *(csrc / each for each in sources)]
    # No contraction to FMA: results are the same in every build.
    compile_flags = [
        "-std=c++20", "-O1", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden",
        "-ffp-contract=off", "-Wno-unknown-pragmas", "-DPEFT_KERNELS_EMULATED",
        *SANITIZERS[sanitizer], *flags,
    ]  # fmt: skip
    # Not part of a key: what is included is. A copy of csrc with one file changed has every object
    # compiled already that does not include it.
    folders = [csrc / "cuda", csrc, HERE]
    link_flags = [*SANITIZERS[sanitizer], "-pthread", *(["-shared"] if shared else [])]
    if torch:
        compile_flags += _torch_compile_flags()
        link_flags += _torch_link_flags()
    CACHE.mkdir(parents=True, exist_ok=True)
    keys = [_key(_digest(*_with_included(path, folders)), *compile_flags) for path in paths]
    target = CACHE / _key("link", *keys, *link_flags)
    if shared:
        target = target.with_suffix(".so")
    if target.exists():
        return target
    with _lock(target):
        if target.exists():
            return target
        objects = [CACHE / f"{key}.o" for key in keys]
        with ThreadPoolExecutor(max_workers=2) as pool:
            each_flags = [[*compile_flags, *(f"-I{folder}" for folder in folders)]] * len(paths)
            list(pool.map(_compile, paths, objects, each_flags))
        unfinished = target.with_suffix(f".{os.getpid()}")
        _run([COMPILER, *map(str, objects), *link_flags, "-o", str(unfinished)])
        unfinished.rename(target)
    return target


def _compile(source: Path, target: Path, flags: Sequence[str]) -> None:
    if target.exists():
        return
    flags = list(flags)
    if source == RUNTIME:
        # The matrix products are made here. Threads of the emulated GPU, not of the runtime, race.
        flags.append("-O2")
        if "-fsanitize=thread" in flags:
            flags = [each for each in flags if each != "-fsanitize=thread"] + ["-DPK_TSAN"]
    # Another process may be at the same object for another target.
    unfinished = target.with_suffix(f".{os.getpid()}")
    _run([COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
    unfinished.rename(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-8000:]}")


def _key(*parts: str) -> str:
    text = "\n".join((*parts, _compiler_version())).replace(str(ROOT), "")
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _with_included(source: Path, folders: Sequence[Path]) -> list[Path]:
    """Return a source and what it includes of ``folders``, directly or not."""
    found = [source]
    for path in found:
        for name in re.findall(r'^ *# *include "(.+)"', path.read_text(), re.MULTILINE):
            places = [folder / name for folder in (path.parent, *folders)]
            place = next((each for each in places if each.exists()), None)
            if place and place not in found:
                found.append(place)
    return found


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    with target.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _torch_compile_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    # The oldest torch whose stable ABI the library uses, as in setup.py.
    return [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-isystem{path}" for path in include_paths()),
    ]


def _torch_link_flags() -> list[str]:
    from torch.utils.cpp_extension import library_paths

    folders = library_paths()
    return [
        *(f"-L{path}" for path in folders),
        *(f"-Wl,-rpath,{path}" for path in folders),
        "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
