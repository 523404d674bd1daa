"""The option of the pytest-benchmark files."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--bench-cases``."""
    parser.addoption(
        "--bench-cases",
        choices=("tiny", "small", "full"),
        default="small",
        help="tiny: shows that it runs; small (default): a few small CPU cases, or the reported "
        "ones on a GPU; full: all cases that this machine's device has",
    )
