"""The whole CUDA library on the CPU: backend "cuda" of every method, for tests to demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft_kernels.core import cuda_library
from tests.cuda_emulation import build

ORDERS = [(build.ASCENDING, 0), (build.DESCENDING, 0), (build.RANDOM, 1), (build.RANDOM, 2)]
ORDER_NAMES = ["ascending", "descending", "random-1", "random-2"]


@contextmanager
def emulation() -> Iterator[build.Emulation]:
    """Build and load kernels and bindings, and let ``backend="cuda"`` run on them meanwhile."""
    csrc = build.ROOT / "csrc"
    sources = [*csrc.glob("cuda/*.cu"), *csrc.glob("cuda_binding/*.cpp")]
    path = build.library(sorted(sources), torch=True)
    cuda_library.emulate(path)
    try:
        yield build.Emulation(path)
    finally:
        cuda_library.emulate(None)
