"""A pytest plugin that keeps every n-th test: SHARD=2/8 runs the second eighth.

The tests on a GPU mostly wait for the compiler, which has one core; pytest-xdist may be missing.
"""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)  # after the deselection by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what other shards run."""
    number, count = (int(part) for part in os.environ["SHARD"].split("/"))
    kept = items[number - 1 :: count]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
