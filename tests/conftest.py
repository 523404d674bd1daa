"""What holds for every test: the interpreter without a GPU, a clean environment, a fixed seed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Triton reads this once, when it is first imported; on a GPU the compiled kernels are to be tested.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Only now, with that set.
from peft_kernels.core import triton_runtime  # noqa: E402

# A developer's own settings must not decide which backend the tests see.
for _name in [name for name in os.environ if name.startswith("PEFT_KERNELS_")]:
    del os.environ[_name]


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores between the processes of pytest-xdist."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no GPU."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def steady_products() -> None:
    """Let products in Triton's interpreter be the same on every machine.

    It hands float32 blocks to NumPy's BLAS, whose order of summation differs between CPUs, and
    between q kᵀ and k qᵀ of the same numbers: by more than what tells the accuracy of a kernel. A
    block's product is summed in float64 and rounded once instead.
    """
    if HAS_GPU or triton_runtime.import_problem() is not None:
        return
    import numpy as np
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def steady_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32 or d.data.dtype != np.float32:
            return create_dot(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = steady_dot
