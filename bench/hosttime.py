"""Where the host's time goes in one small call."""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

import torch

from bench.method import DIRECTIONS, Case, Provider
from bench.methods import method_of
from bench.rows import call_of

ROOT = Path(__file__).resolve().parent.parent
Entry = dict[str, float | str]


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
