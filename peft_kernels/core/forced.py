"""A variant of a kernel that launches are made to take, for tests and benchmarks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Forced:
    """The variant that one op's launches are made to take; not for several threads.

    Attributes:
        variants: what there is to choose from.
        current: the one that is taken, None where the table decides.
    """

    def __init__(self, *variants: str) -> None:
        """Leave the choice to the table."""
        self.variants = variants
        self.current: str | None = None

    @contextlib.contextmanager
    def variant(self, variant: str | None) -> Iterator[None]:
        """Make launches take ``variant`` where it can serve; None: what the table says.

        Raises:
            ValueError: there is no such variant.
        """
        if variant is not None and variant not in self.variants:
            raise ValueError(f"variant must be one of {', '.join(self.variants)}, got {variant!r}")
        before, self.current = self.current, variant
        try:
            yield
        finally:
            self.current = before
