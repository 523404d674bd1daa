"""Entries that overrule the tile tables: those of a user's file, or those that a tuner tries.

``PEFT_KERNELS_TILES`` names the file, which ``bench.tune`` writes and ``tile_file`` reads and
checks, once, when the first tile is looked up. Tables ask here before they answer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

VARIABLE = "PEFT_KERNELS_TILES"
# Family, table ("lora", "prefix", ..., "limits"), width ("16bit", "fp32"; of a limit its name) and
# the entry's name.
Key = tuple[str, str, str, str]


@dataclass(frozen=True, eq=False)
class Overrides:
    """Entries of tile tables; told apart by identity, so that launches remember each by itself.

    Attributes:
        entries: a tile or a number by its key.
        source: the file they are from, "" where there is none.
    """

    entries: Mapping[Key, Any]
    source: str = ""


class _State:
    """What is in force.

    Attributes:
        forced: what a tuner tries, or None; not for several threads.
        file: what the user's file says, None as long as nobody has asked.
    """

    forced: Overrides | None = None
    file: Overrides | None = None


STATE = _State()


def entry(family: str, table: str, width: str, name: str, otherwise: Any) -> Any:
    """Return the entry of that key, ``otherwise`` where nothing overrules the table.

    Raises:
        ValueError: the user's file is wrong.
    """
    key = (family, table, width, name)
    if STATE.forced is not None and key in STATE.forced.entries:
        return STATE.forced.entries[key]
    return _file().entries.get(key, otherwise)


def note(family: str, *tables: str) -> str:
    """Return what ``explain`` says of the file's entries in a family's tables, "" of none."""
    found = any(key[0] == family and key[1] in tables for key in _file().entries)
    return f"; tiles of {_file().source}" if found else ""


@contextlib.contextmanager
def forced(overrides: Overrides | None) -> Iterator[None]:
    """Let these entries overrule tables and file; None: what those say."""
    before, STATE.forced = STATE.forced, overrides
    try:
        yield
    finally:
        STATE.forced = before


def forget() -> None:
    """Forget the user's file, as after changing the environment."""
    STATE.file = None


def _file() -> Overrides:
    if STATE.file is None:
        path = os.environ.get("PEFT_KERNELS_TILES")
        if path:
            from peft_kernels.core import tile_file

            STATE.file = tile_file.load(path)
        else:
            STATE.file = Overrides({})
    return STATE.file
