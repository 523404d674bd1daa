"""How the drivers are run: programs of a few kernels, which say what is wrong in which order."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS

BLOCKS = 3  # at once: fewer than 256 threads of small tiles
MORE_ORDERS = [*ORDERS, *((build.RANDOM, seed) for seed in range(3, 9))]
RACE_ORDERS = [ORDERS[0], ORDERS[2]]
COMPLAINTS = {"thread": "data race", "address": "AddressSanitizer"}


def failure(program: Path, orders: list[tuple[int, int]], blocks: int = BLOCKS) -> str | None:
    """Return what a program says in the first order that it fails in, or None."""
    for order, seed in orders:
        command = [str(program), str(order), str(seed), str(blocks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            return f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return None
