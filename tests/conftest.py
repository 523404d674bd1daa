"""What holds for every test: the interpreter without a GPU, a clean environment, a fixed seed."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Triton reads this once, when it is first imported; on a GPU the compiled kernels are to be tested.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
