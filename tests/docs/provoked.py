"""How each message of docs/troubleshooting.md comes about: functions by message.

A function raises what the message is of, or returns the text where it is a reason or a warning. It
is given pytest's monkeypatch and an empty folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Provoke = Callable[[pytest.MonkeyPatch, Path], str | None]
PROVOKED: dict[str, Provoke] = {}


def provokes(message: str) -> Callable[[Provoke], Provoke]:
    """Enter a function under the message it provokes, written as on the page."""

    def enter(function: Provoke) -> Provoke:
        assert message not in PROVOKED
        PROVOKED[message] = function
        return function

    return enter
