"""Fixtures of the tests of CUDA kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDER_NAMES, ORDERS, emulation

# What sm_75 has for a block, and what the emulation puts between the arrays of it.
SHARED_BYTES = 64 * 1024 + 8 * 64


@pytest.fixture(scope="module")
def device() -> Iterator[build.Emulation]:
    """Run backend "cuda" emulated, its threads in ascending order, as the smallest GPU would."""
    with emulation() as device:
        device.order(build.ASCENDING)
        device.shared_bytes(SHARED_BYTES)
        yield device


@pytest.fixture(params=ORDERS, ids=ORDER_NAMES)
def ordered(device: build.Emulation, request: pytest.FixtureRequest) -> Iterator[build.Emulation]:
    """Run backend "cuda" emulated, its threads in each of several orders."""
    device.order(*request.param)
    yield device
    device.order(build.ASCENDING)
