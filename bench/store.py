"""Results on disk: plain JSON with the machine it came from, never half written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import third_party
from peft_kernels import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a number depends on: machine, versions, commit."""
    report = environment.report()
    versions, devices = report["versions"], report["devices"]
    described: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _named() or _git("rev-parse", "HEAD"),
        # Earlier results lie in the tree; they are not a change of what is measured.
        "dirty": not _named() and bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "cpu": devices["cpu"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": versions["triton"],
        "numpy": versions["numpy"],
        "threads": torch.get_num_threads(),
        "device": device.type,
        "third_parties": third_party.present(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["driver"] = devices["driver"]
        described["cuda"] = torch.version.cuda
    return described


def _named() -> str | None:
    """Return the commit that the caller says the tree is a copy of: its .git may be another's."""
    return os.environ.get("PEFT_KERNELS_COMMIT") or os.environ.get("COMMIT") or None


def _git(*arguments: str) -> str | None:
    """Return git's answer, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def file_stem(described: dict[str, Any]) -> str:
    """Return a file name's beginning: date, commit, device."""
    when = re.sub(r"[-:]|\+.*", "", described["date"])
    commit = (described["commit"] or "no-commit")[:10] + ("-dirty" if described["dirty"] else "")
    name = described.get("gpu") or described["cpu"].split(",")[0]
    return f"{when}-{commit}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def why_not_writable(folder: Path) -> str | None:
    """Make ``folder`` and return why no file can be written there, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"nothing can be written to {folder}: {error.strerror or error}"


def write_new(folder: Path, stem: str, content: dict[str, Any]) -> Path:
    """Write ``content`` to a new JSON file in ``folder``, whole or not at all; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder, content)
    try:
        for number in range(1, 1000):
            target = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
            try:
                os.link(temporary, target)  # unlike a rename, refuses a name that is taken
            except FileExistsError:
                continue
            return target
    finally:
        temporary.unlink()
    raise FileExistsError(f"{folder / stem}.json and 998 files beside it exist")


def replace(target: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``target``, which at every moment is the old file or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target.parent, content)
    try:
        temporary.replace(target)
    except OSError:
        temporary.unlink()
        raise


def _temporary(folder: Path, content: dict[str, Any]) -> Path:
    # Text first: what JSON cannot hold must not leave a file behind.
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=".", suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path = Path(file.name)
    path.chmod(0o644)
    return path
