"""Measure tiles on the GPU at hand and write those that win as a file for ``PEFT_KERNELS_TILES``.

``python -m bench.tune OUT.json SECONDS [--method prefix ...] [--only "key 128"] [--dry]``, or
``python -m peft_kernels bench --tune`` and the same.

What is worth most comes first, and OUT.json is rewritten after each entry. Every candidate is first
held against float64 at a small case, in processes of their own that also compile it, then against
the present tile's result at the size that is timed. Times are of the device, cold L2, interleaved.
``--dry`` proves on a CPU that this runs, through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import store
from bench.measure import device_times
from bench.tuning.candidates import METHODS, Candidate, Target, candidates, present, targets_of
from bench.tuning.judges import Judges
from bench.tuning.launches import tiny
from bench.tuning.offline import known
from bench.tuning.trial import Verdict, apart, case_dtype
from peft_kernels.core import lora_tables, lora_tiles, prefix_tiles, tile_file, tiles

# What a tile must gain to take the present one's place: less may be the weather.
LEAST_GAIN = 0.01
FINALISTS = 3
AT_ONCE = 3  # entries whose candidates are tried before they are timed
SPARE_S = 15.0  # kept for the timing of what was tried
_LEAST_WORK = 1 << 35  # of a shape class that the tables give no tile by TMA


@dataclass
class Result:
    """What is known of a target: milliseconds of each tile at each case, and why others fell out.

    ``ratios`` are geometric means over the cases, of the present tile's time; ``registers`` are of
    a thread.
    """

    present: str
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)


def measure(
    target: Target,
    chosen: Sequence[Candidate],
    verdicts: Sequence[Verdict],
    device: torch.device,
) -> tuple[Result, dict[str, Candidate]]:
    """Time what is right of a target's candidates beside the present tile, the first of them.

    A tile of which more registers spill than of the present one is no better for being faster at
    one size: it waits for a form of the kernel that needs one register more.
    """
    result = Result(str(present(target, tiles.table_of(device)) or "interpreted"))
    alive, spills = {str(chosen[0]): chosen[0]}, verdicts[0].spills
    for candidate, verdict in zip(chosen, verdicts, strict=True):
        name, problem = str(candidate), verdict.problem
        if problem is None and verdict.spills > spills:
            problem = f"{verdict.spills} registers spill, of the present tile {spills}"
        if problem is None:
            alive[name] = candidate
            result.registers[name] = verdict.registers
        else:
            result.refused[name] = problem
    for case in target.cases if device.type == "cuda" else map(tiny, target.cases[:1]):
        alive, result.times[case.name] = _timed(target, case, alive, result, device)
    for name in alive:
        logs = [math.log(times[name] / times["present"]) for times in result.times.values()]
        result.ratios[name] = math.exp(sum(logs) / len(logs))
    return result, alive


def _timed(
    target: Target,
    case: Any,
    alive: dict[str, Candidate],
    result: Result,
    device: torch.device,
) -> tuple[dict[str, Candidate], dict[str, float]]:
    """Return the candidates that are right at this size, and their times; the best ones twice."""
    dtype = case_dtype(case)
    launch = target.make(case, target.launch, device, dtype, True)
    launch.run()
    expected = [each.clone() for each in launch.outputs]
    right = {}
    for name, candidate in alive.items():
        for output in launch.outputs:
            output.fill_(torch.nan)
        with candidate.forced():
            launch.run()
        problem = apart(launch.outputs, expected, dtype)
        if problem is None or name == "present":
            right[name] = candidate
        else:
            result.refused[name] = problem

    def call(candidate: Candidate) -> Any:
        def within() -> None:
            with candidate.forced():
                launch.run()

        return within

    def times(chosen: dict[str, Candidate], seconds: float) -> dict[str, float]:
        calls = {name: call(candidate) for name, candidate in chosen.items()}
        found = device_times(calls, seconds, rounds=(8, 200))
        return {name: timing.p20_ms for name, timing in found.items()}

    if device.type == "cpu":
        return right, {name: _once(call(candidate)) for name, candidate in right.items()}
    found = times(right, 0.6)
    best = sorted(found, key=lambda name: found[name])[:FINALISTS]
    final = {name: right[name] for name in dict.fromkeys(("present", *best))}
    return right, found | times(final, 0.5)


def _once(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def ordered(target: Target, family: str) -> list[Candidate]:
    """Return the candidates as they are tried: the most promising and the nearest, by turns."""
    near = candidates(target, family)
    if family == tiles.INTERPRETED:
        return near
    scored = sorted(near, key=lambda each: known(target, each, family, compiled=False).score)
    turns = itertools.chain.from_iterable(zip(scored, near, strict=True))
    return list(dict.fromkeys(turns))


def chosen_entries(target: Target, result: Result, alive: dict[str, Candidate]) -> dict[Any, Any]:
    """Return the entries that a target's measurement asks for: none where the present tile wins."""
    ranked = sorted((ratio, name) for name, ratio in result.ratios.items() if name in alive)
    if not ranked or ranked[0][0] > 1 - LEAST_GAIN:
        return {}
    best = alive[ranked[0][1]]
    entries = {best.entry: best.tile}
    family = best.entry[0]
    if target.table == "prefix" and best.variant == "pointers":
        launch, size = target.name.split()[:2]
        if "drop" not in target.name and prefix_tiles.tma_entry(family, launch, int(size)):
            entries[(*best.entry[:3], f"tma {target.name}")] = None
    if target.table == "lora" and f"tma {target.name}" in tile_file.NAMES["lora"]:
        before = lora_tiles.tma_from(family, target.name)
        by_tma = best.variant == "ticket_tma"
        if by_tma != (before is not None) and family in lora_tables.TMA:
            least = None
            if by_tma:
                least = lora_tables.TMA_FROM[family][target.name] or _LEAST_WORK
            entries[family, "limits", "tma_from", target.name] = least
    return entries


def _summary(target: Target, result: Result, seconds: float) -> str:
    ranked = sorted(result.ratios.items(), key=lambda item: item[1])[:3]
    shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ranked)
    count = len(result.ratios)
    return (
        f"{seconds:6.1f} s  {target}: present {result.present}; {count} timed, "
        f"{len(result.refused)} refused; of its time: {shown}"
    )


def main(arguments: Sequence[str]) -> int:
    """Tune, and return 0; 3 if the device no longer answers."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.tune")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--method", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--only", default="", help="part of an entry's place, as in 'key 128'")
    parser.add_argument("--most", type=int, default=20, help="candidates of an entry")
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2))
    parser.add_argument("--dry", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"seconds must be a number above 0, got {options.seconds:g}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --dry walks through on a CPU")
    if problem := store.why_not_writable(options.out.parent):
        parser.error(problem)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is imported by the first launch
    start = time.monotonic()
    ends = start + options.seconds
    device = torch.device("cpu" if options.dry else "cuda", None if options.dry else 0)
    family = tiles.table_of(device)
    try:
        found = targets_of(family, options.method, options.only)
    except ValueError as error:
        parser.error(str(error))
    asked = [(target, ordered(target, family)[: options.most]) for target in found]
    asked = [
        (target, [Candidate(chosen[0].entry, None), *chosen]) for target, chosen in asked if chosen
    ]
    judges = Judges(0 if options.dry else options.workers, device)
    content: dict[str, Any] = {
        "what": "tiles for PEFT_KERNELS_TILES: the fastest of the candidates measured; times are "
        "milliseconds of one launch, 20th percentile, cold L2; prefix: launches of keys' gradients "
        "include that of delta",
        "machine": store.machine(device), "families": {}, "measured": {},
    }  # fmt: skip
    entries: dict[Any, Any] = {}
    longest, status = 0.0, 0
    try:
        # Nothing is compiled or tried while tiles are timed.
        at_once, spare_s = (1, 0.0) if options.dry else (AT_ONCE, SPARE_S)
        for first in range(0, len(asked), at_once):
            began = time.monotonic()
            if began + 1.1 * longest > ends:
                break
            batch = asked[first : first + at_once]
            for target, chosen in batch:
                judges.ask(target, chosen)
            tried = [
                [judges.answer(target, candidate, ends - spare_s) for candidate in chosen]
                for target, chosen in batch
            ]
            for (target, chosen), verdicts in zip(batch, tried, strict=True):
                if time.monotonic() > ends - spare_s / 3:
                    break
                result, alive = measure(target, chosen, verdicts, device)
                entries |= chosen_entries(target, result, alive)
                content["families"] = tile_file.dumped(entries)
                content["measured"][str(target)] = vars(result)
                store.replace(options.out, content)
                print(_summary(target, result, time.monotonic() - start), flush=True)
            longest = max(longest, time.monotonic() - began)
    except RuntimeError as error:  # an illegal access ends the device for the whole process
        print(f"the device no longer answers: {str(error)[:300]}", flush=True)
        status = 3
    finally:
        judges.end()
    store.replace(options.out, content)
    print(f"{len(entries)} entries in {options.out}, {time.monotonic() - start:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
