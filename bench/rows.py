"""One row of a table: a provider at a case, gated, timed and counted."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench import memory
from bench.gate import Gate
from bench.measure import Call, Timing, device_times, synchronizer, wall_times
from bench.method import DIRECTIONS, FORWARD, Case, Method, Provider, first
from bench.methods import METHODS, method_of
from bench.roofline import Peaks, measure_peaks

_BESIDE = ("item", "commit", "date")
TIMED, FAILED, NOT_RUN = "timed", "failed", "not run"


@dataclass(frozen=True)
class Row:
    """What is known of one provider at one case in one direction.

    Attributes:
        case: the case.
        direction: "forward" (with what it saves for backward) or "forward+backward".
        provider: name of the provider.
        status: "timed", "failed" (its numbers are wrong, or it raised) or "not run".
        note: what the gate found, or why there is no time.
        plan: backend, variant and tile, where the provider has a choice.
        timing: wall clock on a CPU, device time with a cold cache on a GPU; None unless "timed".
        wall: wall clock of calls back to back, on a GPU.
        ratio_frozen: least time over the frozen layer's least.
        ratio_eager: likewise over the eager form's, the fastest where there are several.
        roofline: the least time that the counted work allows, over the least time taken.
        saved_bytes: kept for backward beyond x and the parameters.
        launches: kernels launched, on a GPU.
        peak_bytes: device memory held at most during the call, on a GPU.
        over: the provider that ``ratio_eager`` is over.
    """

    case: Any
    direction: str
    provider: str
    status: str
    note: str = ""
    plan: str | None = None
    timing: Timing | None = None
    wall: Timing | None = None
    ratio_frozen: float | None = None
    ratio_eager: float | None = None
    roofline: float | None = None
    saved_bytes: int | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    over: str | None = None


class PeakTable:
    """Peaks of one device by dtype: the best of all measurements so far."""

    # Neighbours do not come and go faster than this.
    AGAIN_S = 20.0

    def __init__(self, device: torch.device, *, tiny: bool = False) -> None:
        """Remember the device; ``tiny`` measures something small, to prove that the code runs."""
        self.device, self.tiny = device, tiny
        self.measured: dict[torch.dtype, Peaks] = {}
        self._when: dict[torch.dtype, float] = {}

    def measure(self, dtype: torch.dtype) -> None:
        """Measure a dtype's peaks again after a while: neighbours may have disturbed the first."""
        if time.monotonic() < self._when.get(dtype, -math.inf) + self.AGAIN_S:
            return
        self._when[dtype] = time.monotonic()
        found = measure_peaks(self.device, dtype, tiny=self.tiny)
        self.measured[dtype] = found.best(self.measured.get(dtype, found))

    def fill(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows with their share of the roofline, by the best peaks."""
        return [self._filled(row) for row in rows]

    def _filled(self, row: Row) -> Row:
        peaks = self.measured.get(row.case.torch_dtype)
        if peaks is None or row.timing is None:
            return row
        work = method_of(row.case).work(row.case, row.direction, row.provider)
        share = peaks.least_ms(work) / row.timing.min_ms
        return replace(row, roofline=share)


def call_of(provider: Provider, problem: Any, direction: str) -> Callable[[], Any]:
    """Return what is timed: the provider's forward, or that and the gradients a training needs."""
    forward = provider.build(problem, None)
    leaves = list(problem.leaves(provider.frozen).values())

    def both() -> Any:
        return torch.autograd.grad(first(forward()), leaves, problem.dy)

    call: Callable[[], Any] = forward if direction == FORWARD else both
    if provider.around is contextlib.nullcontext:
        return call

    def within() -> Any:
        with provider.around():
            return call()

    return within


def _verdict(provider: Provider, problem: Any, gate: Gate) -> tuple[str, str]:
    reason = provider.why_not(problem)
    if reason is not None:
        return NOT_RUN, reason
    result = gate.check(provider)
    return (TIMED if result.passed else FAILED), str(result)


def _counts(provider: Provider, problem: Any, direction: str) -> dict[str, int | None]:
    device = problem.dy.device
    call = call_of(provider, problem, direction)
    return {
        "launches": memory.count_launches(call, device),
        "peak_bytes": memory.peak_bytes(call, device),
    }


def _times(
    calls: Mapping[str, Call], device: torch.device, seconds: float, least_rounds: int
) -> tuple[dict[str, Timing], dict[str, Timing | None]]:
    """Return the times that count, and the wall clock beside device times."""
    if device.type != "cuda":
        return wall_times(calls, seconds, rounds=(least_rounds, 400)), dict.fromkeys(calls)
    on_device = device_times(calls, 0.7 * seconds)
    wall = wall_times(calls, 0.3 * seconds, rounds=(3, 50), synchronize=synchronizer(device))
    return on_device, dict(wall)


def measure_case(
    case: Any,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    peaks: PeakTable,
    *,
    counted: bool = True,
    least_rounds: int = 5,
) -> list[Row]:
    """Gate every provider of ``case``, then time those that passed, in turn.

    Args:
        case: what is computed.
        providers: who computes it.
        device: where.
        seconds: roughly how long the timing takes over all providers and both directions.
        peaks: for the roofline.
        counted: also count saved bytes and launches; starting the profiler takes a while.
        least_rounds: of the wall clock, however long they take.
    """
    method = method_of(case)
    problem = method.make_problem(case, device)
    gate = Gate(problem)
    verdicts = {each.name: _verdict(each, problem, gate) for each in providers}
    del gate  # float64 results of every tensor
    running = [each for each in providers if verdicts[each.name][0] == TIMED]
    saved = {
        each.name: memory.saved_bytes(call_of(each, problem, FORWARD), problem.alive)
        for each in running
        if counted
    }
    rows = []
    peaks.measure(case.torch_dtype)
    for direction in DIRECTIONS:
        calls = {each.name: call_of(each, problem, direction) for each in running}
        times, walls = _times(calls, device, seconds / 2, least_rounds) if calls else ({}, {})
        frozen, (eager, over) = times.get(method.frozen or ""), _eager(method, times)
        for provider in providers:
            name = provider.name
            status, note = verdicts[name]
            plan = provider.plan(problem) if status != NOT_RUN else None
            if status != TIMED:
                rows.append(Row(case, direction, name, status, note, plan))
                continue
            timing = times[name]
            rows.append(
                Row(
                    case, direction, name, status, note, plan, timing, walls[name],
                    ratio_frozen=_ratio(timing, frozen), ratio_eager=_ratio(timing, eager),
                    saved_bytes=saved.get(name), over=over,
                    **(_counts(provider, problem, direction) if counted else {}),
                )
            )  # fmt: skip
    return peaks.fill(rows)


def saved_row(case: Any, provider: Provider, device: torch.device) -> Row:
    """Return a row with the bytes saved for backward alone, counted on real tensors of ``case``."""
    problem = method_of(case).make_problem(case, device)
    reason = provider.why_not(problem)
    if reason is not None:
        return Row(case, FORWARD, provider.name, NOT_RUN, reason)
    saved = memory.saved_bytes(call_of(provider, problem, FORWARD), problem.alive)
    plan = provider.plan(problem)
    return Row(case, FORWARD, provider.name, NOT_RUN, "bytes only", plan, saved_bytes=saved)


def _eager(method: Method, times: Mapping[str, Timing]) -> tuple[Timing | None, str | None]:
    """Return the fastest hand-written form's time, and its name."""
    forms = [(times[name].min_ms, name) for name in method.eager if name in times]
    if not forms:
        return None, None
    name = min(forms)[1]
    return times[name], name


def plain(row: Row) -> dict[str, Any]:
    """Return a row as JSON files hold it."""
    return {"op": row.case.op, **asdict(row)}


def row_of(held: Mapping[str, Any]) -> Row:
    """Return the row that ``plain`` made ``held`` of; files of format 1 hold LoRA's rows alone.

    What a report and the committed files write beside it is left out.
    """
    fields = {name: value for name, value in held.items() if name not in _BESIDE}
    case_type = METHODS[fields.pop("op", "lora")].case_type
    times = {name: held[name] and Timing(**held[name]) for name in ("timing", "wall")}
    return Row(**{**fields, "case": case_type(**held["case"]), **times})


def _ratio(timing: Timing, base: Timing | None) -> float | None:
    return None if base is None else timing.min_ms / base.min_ms


def guarded(measure: Callable[[], list[Row]], case: Case) -> list[Row]:
    """Return ``measure()``'s rows, or one that says what it raised: the other cases still run."""
    try:
        return measure()
    except Exception as error:  # out of memory, a broken kernel, whatever comes
        return [Row(case, FORWARD, "all", FAILED, f"{type(error).__name__}: {str(error)[:300]}")]
