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
    """Time host calls by the wall clock.

    Args:
        calls: what is timed, by name.
        seconds: roughly how long, over all calls.
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

    repeats, round_s = {}, 0.0
    for name, call in calls.items():
        estimate = min(sample(call, 1) for _ in range(2))
        if estimate < 10 * shortest_sample_s:  # a long call is warm by now
            estimate = min(sample(call, 1) for _ in range(3))
        repeats[name] = max(1, math.ceil(shortest_sample_s / max(estimate, 1e-7)))
        round_s += estimate * repeats[name]
    total = min(rounds[1], max(rounds[0], int(seconds / max(round_s, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(total):
            first = index % len(names)  # nobody always runs after the same neighbour
            for name in names[first:] + names[:first]:
                samples[name].append(1e3 * sample(calls[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}


def device_times(
    calls: Mapping[str, Call], seconds: float, *, slices: int = 4
) -> dict[str, Timing]:
    """Time device work by events with a cold L2 cache, by ``triton.testing.do_bench``.

    A call is replayed as a CUDA graph: launched one by one, short kernels would be timed by how
    fast the host launches them, which the wall clock tells. A call that waits for the device
    cannot be captured and is timed as it is. Each provider's repetitions come in ``slices``,
    providers taking turns.

    Args:
        calls: what is timed, by name.
        seconds: device time over all calls, cache clearing and warm-up not counted.
        slices: how many turns each provider takes.
    """
    from triton.testing import do_bench

    rep_ms = max(5.0, 1e3 * seconds / (slices * max(1, len(calls))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    replays = {name: replayed(call) for name, call in calls.items()}
    for index in range(slices):
        warmup_ms = 25 if index == 0 else 5
        for name, call in replays.items():
            samples[name] += do_bench(call, warmup=warmup_ms, rep=rep_ms, return_mode="all")
    return {name: summarise(values) for name, values in samples.items()}


def replayed(call: Call) -> Call:
    """Return what replays the launches of ``call`` as a CUDA graph; ``call`` if none can be made.

    Its results stay where the first replay puts them: this is for timing alone.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is made at first calls must not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def synchronizer(device: torch.device) -> Call | None:
    """Return what waits for ``device``'s queued work, or None where calls are synchronous."""
    return torch.cuda.synchronize if device.type == "cuda" else None
