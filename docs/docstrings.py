"""What Griffe, the reader of docstrings for the site, is to see otherwise than it is written."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Makes the docstrings of this package come out right."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Let "Example:" be the section of code that "Examples:" is."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )

    def on_function(self, *, func: Any, **_: Any) -> None:
        """Leave out what a constructor says: its class has said it."""
        if func.name == "__init__":
            func.docstring = None

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """Forget the few annotated attributes of layers: Griffe hands their types on to others."""
        if any("Module" in str(base) for base in cls.bases):
            for member in cls.members.values():
                if member.is_attribute:
                    member.annotation = None
