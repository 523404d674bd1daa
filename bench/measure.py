"""Timers: every provider of a case is timed in turn, round after round.

Interleaving spreads drifts of clock speed and neighbours over all of them. The minimum is what a
shared machine can repeat, since neighbours only ever add time, and what ratios are taken of; the
percentiles tell how quiet it was.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Larger than any GPU's L2 cache; overwriting it takes no GPU less than this.
_BLOCKER_BYTES = 1 << 29
_LEAST_BLOCK_S = 60e-6

# Minima have settled when this many rounds in a row lowered none by more than this share, half of
# the time being over: neighbours come and go.
_SETTLED_ROUNDS = 25
_SETTLED_SHARE = 0.003
# Calls of a few milliseconds are made several times before one is taken for typical.
_WARM_S = 0.1


@dataclass(frozen=True)
class Timing:
    """Statistics of one provider's samples, in milliseconds a call."""

    min_ms: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int


def summarise(samples_ms: Sequence[float]) -> Timing:
    """Return the statistics of at least one sample."""
    ordered = sorted(samples_ms)

    def quantile(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return Timing(ordered[0], quantile(0.2), quantile(0.5), quantile(0.8), len(ordered))


def wall_times(
    calls: Mapping[str, Call],
    seconds: float,
    *,
    rounds: tuple[int, int] = (5, 400),
    shortest_sample_s: float = 0.002,
    synchronize: Call | None = None,
) -> dict[str, Timing]:
    """Time host calls by the wall clock, until every minimum has settled or the time is over.

    Args:
        calls: what is timed, by name.
        seconds: roughly how long at most, over all calls.
        rounds: least and most rounds whatever ``seconds`` says; each round times every call once.
        shortest_sample_s: calls faster than this are repeated within a sample.
        synchronize: waits for the device after each sample, where there is one.
    """
    wait = synchronize or (lambda: None)

    def sample(call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        taken_s = [sample(call, 1)]
        while len(taken_s) < 4 and sum(taken_s) < _WARM_S:
            taken_s.append(sample(call, 1))
        repeats[name] = max(1, math.ceil(shortest_sample_s / max(min(taken_s), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    least, lowered = dict.fromkeys(calls, math.inf), 0
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for index in range(rounds[1]):
            first = index % len(names)  # nobody always runs after the same neighbour
            for name in names[first:] + names[:first]:
                taken = 1e3 * sample(calls[name], repeats[name])
                samples[name].append(taken)
                if taken < (1 - _SETTLED_SHARE) * least[name]:
                    least[name], lowered = taken, index
            passed = time.perf_counter() - start
            settled = index >= lowered + _SETTLED_ROUNDS and passed >= seconds / 2
            another = passed * (index + 2) / (index + 1) <= seconds
            if index + 1 >= rounds[0] and (settled or not another):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}


def device_times(
    calls: Mapping[str, Call], seconds: float, *, rounds: tuple[int, int] = (8, 400)
) -> dict[str, Timing]:
    """Time device work by events, with a cold L2 cache and without the host.

    Before each call the device is kept busy, overwriting memory, for longer than the host takes to
    launch the call: its kernels then follow one another, however slow the host is. A call that
    waits for the device is timed with its wait.

    Args:
        calls: what is timed, by name.
        seconds: roughly how long, over all calls.
        rounds: least and most rounds whatever ``seconds`` says; each round times every call once.
    """
    blocker = torch.empty(_BLOCKER_BYTES, dtype=torch.int8, device="cuda")
    blocks, round_s = {}, 0.0
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        starts = [time.perf_counter()]
        for _ in range(4):
            call()
            starts.append(time.perf_counter())
        torch.cuda.synchronize()
        host_s = max(after - before for before, after in zip(starts, starts[1:], strict=False))
        # Twice as long as it took: the host too has its slow moments.
        blocks[name] = 1 + math.ceil(2 * host_s / _LEAST_BLOCK_S)
        round_s += (time.perf_counter() - starts[0]) / 4 + blocks[name] * _LEAST_BLOCK_S
    total = min(rounds[1], max(rounds[0], int(seconds / max(round_s, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(total):
        first = index % len(names)  # nobody always runs after the same neighbour
        for name in names[first:] + names[:first]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(blocks[name]):
                blocker.zero_()
            start.record()
            calls[name]()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end))
    return {name: summarise(values) for name, values in samples.items()}


def synchronizer(device: torch.device) -> Call | None:
    """Return what waits for ``device``'s queued work, or None where calls are synchronous."""
    return torch.cuda.synchronize if device.type == "cuda" else None
