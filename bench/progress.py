"""How far a run is, on stderr: a bar on a terminal, else a line a case."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

_FORMAT = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Step(Protocol):
    """Something that is measured."""

    @property
    def label(self) -> str:
        """What it is."""


StepT = TypeVar("StepT", bound=Step)


def shown(steps: Sequence[StepT]) -> Iterator[StepT]:
    """Yield each step, after telling that it begins."""
    bar = _bar() if sys.stderr.isatty() else None
    if bar is None:
        for number, step in enumerate(steps, 1):
            print(f"[{number}/{len(steps)}] {step.label}", file=sys.stderr, flush=True)
            yield step
        return
    with bar(steps, unit="case", dynamic_ncols=True, bar_format=_FORMAT) as each:
        for step in each:
            each.set_postfix_str(step.label)
            yield step


def _bar() -> Any:
    """Return tqdm, or None where it is not installed, as on a GPU machine without a network."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
