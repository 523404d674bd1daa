"""What a run measures, case by case, and what it has found so far."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench import methods
from bench.hosttime import HostTime, host_times, one_thread, profile_host
from bench.method import COMPILED, CPU, GPU, HOST, MEMORY, OURS, Method, Provider
from bench.rows import TIMED, PeakTable, Row, guarded, measure_case, saved_row


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        ops: names of methods; None: all.
        contains: part of the names of cases.
        baselines: names of the providers beside ours; None: all.
        compiles: whether torch.compile may be among them.
        quick: cut every case to a size that measures nothing.
        seconds: of timing per case at most; None: each method's own.
    """

    ops: Sequence[str] | None = None
    contains: str | None = None
    baselines: Sequence[str] | None = None
    compiles: bool = True
    quick: bool = False
    seconds: float | None = None

    def refused(self) -> str | None:
        """Return what is wrong with a name or a number, if anything is."""
        for op in self.ops or ():
            if op not in methods.METHODS:
                return f"--op {op}: there are {', '.join(methods.METHODS)}"
        known = dict.fromkeys(
            provider.name
            for method in methods.chosen(self.ops)
            for provider in method.providers
            if provider.name != OURS
        )
        for name in self.baselines or ():
            if name not in known:
                return f"--baseline {name}: there are {', '.join(known)}"
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            return f"--seconds {self.seconds:g}: must be a number above 0"
        return None


@dataclass(frozen=True)
class Step:
    """One case, and who computes it."""

    suite: str
    method: Method
    case: Any
    providers: tuple[Provider, ...]

    @property
    def label(self) -> str:
        """What the progress shows."""
        return f"{self.suite}: {self.case.name}"


def steps(suite: str, asked: Asked) -> Iterator[Step]:
    """Yield what is measured in one suite."""
    # The whole grid of a GPU takes hours: it is measured in parts that a case's name selects.
    reported = suite == GPU and asked.contains is None
    kinds = set()
    for method in methods.chosen(asked.ops):
        for case in method.of_suite(suite, reported=reported):
            if (asked.contains or "") not in case.name:
                continue
            kind = (method.name, method.compiled_alike(case))
            providers = tuple(
                each
                for each in method.providers
                if _wanted(each.name, suite, asked, first=kind not in kinds)
            )
            kinds.add(kind)
            yield Step(suite, method, method.quick(case) if asked.quick else case, providers)


def _wanted(name: str, suite: str, asked: Asked, *, first: bool) -> bool:
    """Return whether a provider is measured at a case, which may be the first of its kind.

    Compiling takes seconds a case: on a CPU, that of one case of a kind is measured.
    """
    if name == OURS:
        return True
    if name == COMPILED and (asked.quick or not asked.compiles or suite not in (CPU, GPU)):
        return False
    if asked.baselines is not None:
        return name in asked.baselines
    return name != COMPILED or first or suite != CPU


@dataclass
class Found:
    """Rows, peaks and host times of the steps measured so far."""

    asked: Asked
    peaks: Mapping[str, PeakTable]
    _rows: list[tuple[str, Row]] = field(default_factory=list)
    hosts: list[HostTime] = field(default_factory=list)
    profiles: dict[str, Any] = field(default_factory=dict)

    def measure(self, step: Step) -> None:
        """Add what one step gives; a case that breaks becomes a failed row."""
        with one_thread() if step.suite == HOST else contextlib.nullcontext():
            rows = guarded(partial(self._case, step), step.case)
            timed = any((row.provider, row.status) == (OURS, TIMED) for row in rows)
            if step.suite == HOST and timed:
                self._host(step, rows)
        self._rows += [(step.suite, row) for row in rows]

    def _case(self, step: Step) -> list[Row]:
        peaks = self.peaks[step.suite]
        if step.suite == MEMORY:
            return [
                saved_row(step.case, each, peaks.device)
                for each in step.providers
                if not each.frozen
            ]
        seconds = self.asked.seconds
        if seconds is None:
            seconds = 0.2 if self.asked.quick else step.method.seconds[step.suite]
        return measure_case(step.case, step.providers, peaks.device, seconds, peaks)

    def _host(self, step: Step, rows: list[Row]) -> None:
        device = self.peaks[step.suite].device
        calls = 50 if self.asked.quick else 2000
        self.profiles |= profile_host(step.case, step.method.ours, device, calls=calls)
        self.hosts += host_times(rows, step.method.ours, device)

    def rows(self) -> list[Row]:
        """Return all rows, their shares of the roofline by the best peaks of their suite."""
        return [row for suite, each in self._rows for row in self.peaks[suite].fill([each])]
