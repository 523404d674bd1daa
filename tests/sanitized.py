"""Tests of the CPU kernels with `_C` built under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitized tests/lora/test_cpp.py -k mask    # any arguments of pytest

builds ``build/sanitized`` (a second call compiles what has changed), then runs pytest with it. As
a plugin of that pytest, this module puts the sanitized `_C` in the place of the package's own.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sanitized"
NAME = "peft_kernels._C"
# In front of the program, which is not sanitized; ASan looks for libstdc++'s throw as it starts.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")


def runtimes() -> list[str]:
    """Return the paths of the sanitizers' libraries, empty where the compiler has none."""
    found = []
    for name in RUNTIMES:
        command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        found.append(done.stdout.strip())
    # What the compiler does not have comes back as the bare name.
    return found if all(os.path.isabs(each) for each in found) else []


def build() -> subprocess.CompletedProcess[str]:
    """Compile what has changed of the sanitized `_C`; one process at a time.

    Where nothing has, the library is left alone: setuptools would write it anew, and another
    process may be loading it.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(FOLDER), "--build-temp", str(FOLDER / "objects")]
    FOLDER.mkdir(parents=True, exist_ok=True)
    built_of = FOLDER / "sources"
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = _sources()
        if built_of.exists() and built_of.read_text() == sources:
            return subprocess.CompletedProcess(command, 0, "", "")
        built_of.unlink(missing_ok=True)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PEFT_KERNELS_BUILD": "cpu", "PEFT_KERNELS_SANITIZE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            built_of.write_text(sources)
        return done


def _sources() -> str:
    """Return what a build depends on: Python, torch, the compiler, the files and their times."""
    files = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    lines = [f"{each.relative_to(ROOT)} {each.stat().st_mtime_ns}" for each in sorted(files)]
    return "\n".join([sys.executable, version("torch"), os.environ.get("CXX", ""), *lines])


def environment() -> dict[str, str]:
    """Return the variables of a Python that can load the sanitized `_C`."""
    return os.environ | {
        "LD_PRELOAD": " ".join(runtimes()),
        # Python and torch leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def tests_command(*arguments: str) -> list[str]:
    """Return the command that runs pytest on the sanitized `_C`."""
    return [sys.executable, "-m", "pytest", "-p", "tests.sanitized", *arguments]


def pytest_configure() -> None:
    """Put the sanitized `_C` where everything that imports `_C` finds it."""
    (path,) = (FOLDER / "peft_kernels").glob("_C.*.so")
    import torch  # noqa: F401  # what `_C` is linked with

    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None and NAME not in sys.modules
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


if __name__ == "__main__":
    if not runtimes():
        sys.exit("the compiler has no libasan or libubsan")
    done = build()
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    command = tests_command(*sys.argv[1:])
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode)
