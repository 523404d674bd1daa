"""The host's time in one small call: how much, in how many calls of functions, and where."""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from bench.method import DIRECTIONS, OURS, Case, Provider
from bench.methods import method_of
from bench.rows import Row, call_of

ROOT = Path(__file__).resolve().parent.parent
Entry = dict[str, float | str]


@dataclass(frozen=True)
class HostTime:
    """What one small call of ours takes of the host.

    Attributes:
        case: name of the case.
        direction: "forward" or "forward+backward".
        plan: the backend.
        ours_us: least time of a call.
        eager_us: that of the fastest eager form, timed in turn with ours.
        ratio: ours over eager's.
        python_calls: calls of Python functions in one call, the same on every machine.
        builtin_calls: calls of functions written in C that Python code makes in it.
    """

    case: str
    direction: str
    plan: str | None
    ours_us: float
    eager_us: float
    ratio: float
    python_calls: int
    builtin_calls: int


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: waking and awaiting others is not what the host time is about."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def host_times(rows: Sequence[Row], provider: Provider, device: torch.device) -> list[HostTime]:
    """Return ours of the rows of one small case, with its calls counted; none if it was not timed.

    Args:
        rows: of the case, eager's among them.
        provider: that of our rows.
        device: where.
    """
    found = []
    # On a GPU the wall clock stands beside the device's time.
    timings = {(row.direction, row.provider): row.wall or row.timing for row in rows}
    for row in rows:
        ours, eager = (timings.get((row.direction, name)) for name in (OURS, row.over or ""))
        if row.provider != OURS or ours is None or eager is None:
            continue
        problem = method_of(row.case).make_problem(row.case, device)
        python, builtin = count_calls(call_of(provider, problem, row.direction))
        ours_us, eager_us = (1e3 * each.min_ms for each in (ours, eager))
        found.append(
            HostTime(
                row.case.name, row.direction, row.plan, ours_us, eager_us, ours_us / eager_us,
                python, builtin,
            )
        )  # fmt: skip
    return found


def count_calls(call: Callable[[], object], *, warm: int = 20) -> tuple[int, int]:
    """Return how many Python functions and how many builtins one call of ``call`` calls.

    The least of several calls: now and then one is beside the point, as of a weak reference.

    Args:
        call: what is counted; the function itself is among the Python calls.
        warm: calls before, after which everything is remembered that ever is.
    """
    counts = {"call": 0, "c_call": 0}

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event in counts:
            counts[event] += 1

    for _ in range(warm):
        call()
    found = []
    before = sys.getprofile()
    for _ in range(5):
        counts.update(call=0, c_call=0)
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(before)
        found.append((counts["call"], counts["c_call"] - 1))  # without sys.setprofile itself
    return min(found)


def profile_host(
    case: Case, provider: Provider, device: torch.device, *, calls: int = 2000, top: int = 10
) -> dict[str, list[Entry]]:
    """Return the functions with the most own time, per call, by case and direction.

    The profiler's own cost is in the numbers: they say where the time goes, not how much it is.

    Args:
        case: a case so small that the arithmetic is nothing.
        provider: what is profiled.
        device: where.
        calls: over how many calls the times are averaged.
        top: how many functions are returned.
    """
    problem = method_of(case).make_problem(case, device)
    found = {}
    for direction in DIRECTIONS:
        call = call_of(provider, problem, direction)
        for _ in range(20):
            call()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(calls):
            call()
        profiler.disable()
        found[f"{case.name}, {provider.name}, {direction}"] = _entries(profiler, calls, top)
    return found


def _entries(profiler: cProfile.Profile, calls: int, top: int) -> list[Entry]:
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    by_own = sorted(stats.items(), key=lambda item: item[1][2], reverse=True)
    return [
        {
            "function": _name(where),
            "calls": count / calls,
            "own_us": 1e6 * own / calls,
            "total_us": 1e6 * total / calls,
        }
        for where, (_, count, own, total, _) in by_own[:top]
    ]


def _name(where: tuple[str, int, str]) -> str:
    file, line, function = where
    if file == "~":  # a builtin; its text may hold an address
        return function.split(" at 0x")[0]
    path = Path(file)
    if path.is_relative_to(ROOT) and ".venv" not in path.parts:
        return f"{path.relative_to(ROOT)}:{line} {function}"
    return f"{path.parent.name}/{path.name}:{line} {function}"
