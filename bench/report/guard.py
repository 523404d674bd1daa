"""A pytest plugin that ends a worker of pytest-xdist whose CUDA context no longer works.

After an illegal access every call of that process fails: xdist starts another worker, and the
tests that come after are judged for themselves.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)  # after the test's result has been sent
def pytest_runtest_logfinish(nodeid: str) -> None:
    """End the process, as a crash would, if the device no longer answers."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device no longer answers after {nodeid}: {error}", flush=True)
        os._exit(1)
