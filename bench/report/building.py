"""Builds the compiled kernels in place where they are missing or older than their sources.

A copy of the tree gives every source a new time, so that a stamp beside the objects holds a digest
of what was built; without one, times decide.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path

import torch

from bench import store
from bench.report.stage import ROOT, Stage

NAME, SECONDS = "build", 300.0


def libraries(dry: bool) -> list[Path]:
    """Return the libraries that the report needs: the CUDA one where it can be used and built."""
    folder = ROOT / "peft_kernels"
    needed = [folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    if not dry and torch.cuda.is_available() and (_has_nvcc() or (folder / "_C_cuda.so").exists()):
        needed.append(folder / "_C_cuda.so")
    return needed


def _has_nvcc() -> bool:
    return bool(shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists())


def sources() -> list[Path]:
    """Return everything that a change of calls for a build."""
    found = [ROOT / "setup.py", ROOT / "peft_kernels" / "version.py"]
    kinds = (".cpp", ".cu", ".h", ".cuh", ".py")
    return found + sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in kinds)


def _digest(dry: bool) -> str:
    """Return what tells one build from another: sources, torch, and the GPU it is for."""
    total = hashlib.sha256(torch.__version__.encode())
    if not dry and torch.cuda.is_available():
        total.update(repr(torch.cuda.get_device_capability()).encode())
    for path in sources():
        total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def _stamp(dry: bool) -> Path:
    return ROOT / "build" / f"gpu-report-{'dry' if dry else 'gpu'}.json"


def why_build(dry: bool) -> str | None:
    """Return why a library has to be built, or None."""
    for path in libraries(dry):
        if not path.exists():
            return f"{path.name} is missing"
    if _stamp(dry).exists():
        if json.loads(_stamp(dry).read_text(encoding="utf-8"))["digest"] == _digest(dry):
            return None
        return "the sources, torch or the GPU have changed"
    newest = max(sources(), key=lambda path: path.stat().st_mtime)
    for path in libraries(dry):
        if path.stat().st_mtime < newest.stat().st_mtime:
            return f"{path.name} is older than {newest.relative_to(ROOT)}"
    return None


def run(stage: Stage) -> None:
    """Build, and say how long it took; without the libraries the report goes on."""
    needed = libraries(stage.dry)
    choice = "cuda" if any(path.name == "_C_cuda.so" for path in needed) else "cpu"
    command = ["setup.py", "build_ext", "--inplace"]
    done = stage.run("build", command, SECONDS, PEFT_KERNELS_BUILD=choice)
    if done.status and choice == "cuda":  # its failure takes the CPU kernels with it
        stage.run("build without CUDA", command, SECONDS, PEFT_KERNELS_BUILD="cpu")
    missing = [path.name for path in needed if not path.exists()]
    ok = done.status == 0 and not missing
    if ok:
        store.replace(_stamp(stage.dry), {"digest": _digest(stage.dry)})
    stage.end(ok, f"{choice}: {done}" + (f", {', '.join(missing)} missing" if missing else ""))
