"""The Python in Markdown, run as its reader would run it."""

from __future__ import annotations

import re
from typing import Any

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROMISE = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


def blocks(text: str) -> list[str]:
    """Return the Python blocks of a text, in order."""
    return _BLOCK.findall(text)


def printed(code: str, name: str, names: dict[str, Any] | None = None) -> list[str]:
    """Run a block; return what each ``print`` in it showed.

    Args:
        code: the block.
        name: what a traceback calls it.
        names: what earlier blocks defined; the block's own names are added.
    """
    shown: list[str] = []
    names = {} if names is None else names
    names["print"] = lambda *values: shown.append(" ".join(map(str, values)))
    exec(compile(code, name, "exec"), names)
    return shown


def promised(code: str) -> list[str]:
    """Return what the comments behind the prints of a block say that they show."""
    return _PROMISE.findall(code)


def keeps(shown: str, promise: str) -> bool:
    """Return whether the first line shown is the one promised; "..." stands for anything."""
    pattern = ".*".join(map(re.escape, promise.split("...")))
    return re.fullmatch(pattern, shown.partition("\n")[0]) is not None
