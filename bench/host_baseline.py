"""Host time of small calls held against a committed file, ``bench/baselines/host.json``.

Microseconds differ between machines and stand there to be read. What is compared is ours over
eager's of the same run, with a margin that noise does not reach, and the number of functions that
one call calls, which has no noise.
``python -m peft_kernels bench --write-host-baseline`` writes the file anew.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import store
from bench.hosttime import HostTime, host_times, one_thread
from bench.method import CPU, HOST, Case, Provider
from bench.methods import METHODS, method_of
from bench.rows import PeakTable, measure_case
from peft_kernels import environment

PATH = store.ROOT / "bench" / "baselines" / "host.json"
# Of the ratio, which moves by a tenth between runs on one machine with four busy processes a core.
MARGIN = 1.3
# Calls that may be added before the file must be written anew.
SLACK = 2
# Other versions of Python and torch call other functions; with another CPU, they and its caches
# move the ratio too.
ELSEWHERE = 1.3
_CPU = torch.device(CPU)


@dataclass(frozen=True)
class Setting:
    """What numbers and times depend on: versions without their builds, and the model of CPU."""

    python: str
    torch: str
    cpu: str

    @classmethod
    @functools.cache
    def here(cls) -> Setting:
        """Return that of this process."""
        cpu = environment.report()["devices"]["cpu"].partition(",")[0]
        python = platform.python_version().rpartition(".")[0]
        return cls(python, torch.__version__.partition("+")[0], cpu)


@dataclass(frozen=True)
class Baseline:
    """The committed file: host times by case and direction, and where they were taken."""

    setting: Setting
    times: dict[tuple[str, str], HostTime]

    def complaints(self, found: HostTime) -> list[str]:
        """Return how ``found`` is worse than what is committed: nothing, if it is not."""
        name = f"{found.case}, {found.direction}"
        known = self.times.get((found.case, found.direction))
        if known is None:
            return [f"{name}: not in {PATH.name}; {_ANEW}"]
        said = []
        here = Setting.here()
        most = known.ratio * MARGIN * (1.0 if self.setting == here else ELSEWHERE)
        if found.ratio > most:
            said.append(
                f"{name}: {found.ours_us:.1f} us are {found.ratio:.2f} of eager's "
                f"{found.eager_us:.1f} us; committed {known.ratio:.2f}, allowed {most:.2f}"
            )
        for kind in ("python_calls", "builtin_calls"):
            count, committed = getattr(found, kind), getattr(known, kind)
            versions = (self.setting.python, self.setting.torch)
            same = versions == (here.python, here.torch)
            allowed = SLACK + (committed if same else math.ceil(ELSEWHERE * committed))
            if count > allowed:
                said.append(
                    f"{name}: {count} {kind.replace('_', ' ')}, committed {committed}, "
                    f"allowed {allowed}; if they are worth it: {_ANEW}"
                )
        return said


_ANEW = "python -m peft_kernels bench --write-host-baseline"


def cases() -> list[Case]:
    """Return the small cases of every method."""
    return [case for method in METHODS.values() for case in method.of_suite(HOST)]


def measure(case: Case, *, seconds: float = 3.0, ours: Provider | None = None) -> list[HostTime]:
    """Return our host time of both directions, timed in turn with the eager forms.

    Args:
        case: one of ``cases()``.
        seconds: of timing at most.
        ours: instead of the method's own.
    """
    method = method_of(case)
    ours = ours or method.ours
    providers = [each for each in method.providers if each.name in method.eager]
    peaks = PeakTable(_CPU, tiny=True)
    with one_thread():
        rows = measure_case(case, [*providers, ours], _CPU, seconds, peaks)
        return host_times(rows, ours, _CPU)


def write(path: Path = PATH) -> Path:
    """Measure every small case and write the file."""
    times = [each for case in cases() for each in measure(case)]
    content: dict[str, Any] = {
        "setting": asdict(Setting.here()),
        "times": [asdict(each) for each in times],
    }
    store.replace(path, content)
    return path


def read(path: Path = PATH) -> Baseline:
    """Return the committed file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    times = [HostTime(**each) for each in content["times"]]
    by_name = {(each.case, each.direction): each for each in times}
    return Baseline(Setting(**content["setting"]), by_name)


def table(found: Sequence[HostTime], baseline: Baseline | None = None) -> str:
    """Return host times as text, the committed ratio and calls beside."""
    known = (baseline or read()).times
    lines = [
        f"  {'':<58}{'us':>8}{'eager us':>10}{'x eager':>9}{'committed':>11}{'calls':>9}"
        f"{'committed':>11}"
    ]
    for each in found:
        past = known.get((each.case, each.direction))
        same = past is not None and past.plan == each.plan  # of another backend it says nothing
        ratio, calls = (f"{past.ratio:.2f}", _calls(past)) if past and same else ("-", "-")
        lines.append(
            f"  {f'{each.case}, {each.direction}':<58}{each.ours_us:>8.1f}{each.eager_us:>10.1f}"
            f"{each.ratio:>9.2f}{ratio:>11}{_calls(each):>9}{calls:>11}"
        )
    return "\n".join(lines)


def _calls(each: HostTime) -> str:
    """Return calls of Python functions and of builtins."""
    return f"{each.python_calls}+{each.builtin_calls}"
