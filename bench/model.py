"""Predict every kernel's time on a named GPU, to hold beside what was measured.

``python -m bench.model --gpu H200 [--op lora] [--kernels]`` prints the GPU cases with the time
predicted, what bounds it and, where ``bench/results`` has rows of that GPU, the time measured.

A launch takes its start, then the longest of its arithmetic (in whole waves of tiles), its traffic
and its chain of steps, then the masks it draws; or the sum of them where a kernel overlaps little.
How much of the machine's peaks each kind of kernel attains is in ``USES``: fitted to launches timed
one by one on an H200 (``bench/results/h200``: tiles.json, tiles-second.json, lora-tiles.json,
prefix-tma.json), many of them of the sizes that the report prints, and taken for granted on other
GPUs, where nothing was measured. Tiles are those of the tables as they are, not those of the day a
row was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.machine.gpus import GPUS, Gpu, find, part_of
from bench.machine.kernels import FUSED, Kernel, frozen
from bench.method import DIRECTIONS, GPU, OURS
from bench.methods import METHODS
from bench.rows import TIMED, Row, row_of
from bench.store import RESULTS
from peft_kernels.core import tiles


@dataclass(frozen=True)
class Use:
    """What a kind of kernel attains.

    Attributes:
        compute: of the tensor cores' peak, in a full wave.
        memory: of the memory's bandwidth.
        start_us: a launch, the filling of pipelines and the end of the last program.
        overlaps: whether arithmetic hides traffic.
        step_us: of one step of a loop that nothing hides.
    """

    compute: float
    memory: float
    start_us: float
    overlaps: bool = True
    step_us: float = 0.0


# Copies reach 4252 of 4800 GB/s (rows.json, peaks): 0.886.
USES = {
    # 8192 x 4096 x 4096, frozen, rows.json: 811 TFLOP/s.
    "library": Use(0.82, 0.886, 4.0),
    # lora-tiles.json: the four sizes by TMA, forward and dx: 0.70 to 0.77 in full waves.
    "ticket_tma": Use(0.74, 0.886, 4.0, step_us=0.6),
    # lora-tiles.json: the best pointer tiles: 0.59 to 0.67.
    "ticket": Use(0.62, 0.886, 4.0, step_us=0.6),
    # One size was measured: 16 x 4096 x 4096 waits 0.6 us for each of its 32 steps.
    "recompute": Use(0.62, 0.886, 4.0, step_us=0.6),
    # tiles-second.json, adapters: r 128 over r 64 costs its arithmetic at 600 TFLOP/s.
    "adapter": Use(0.61, 0.886, 6.5, overlaps=False),
    # tiles-second.json and tiles.json, reductions of r 16 to 256.
    "reduction": Use(0.85, 0.886, 8.0, overlaps=False),
    # prefix-tma.json, beside their exponentials: forward and dq, 0.62 to 0.79, heads of 64 and 128.
    "rows": Use(0.69, 0.886, 4.0),
    # Likewise dk and dv and the prefix's gradients, 0.63 to 0.75.
    "keys": Use(0.7, 0.886, 4.0),
    # rows.json, prompt: rows of a table in the order of tokens, and the smallest case's launch.
    "small": Use(1.0, 0.75, 5.0),
}
# Of a multiprocessor in a clock: the special function unit's rate, from the architecture papers.
EXPONENTIALS_A_CLOCK = 16.0
# Reduction of 8192 x 4096 x 4096, r 16, with and without dropout (tiles.json): 56 us for 2**25.
DRAWN_A_CLOCK = 2.5


@dataclass(frozen=True)
class Prediction:
    """A kernel's time, and what it waits for most: compute, memory, waves, steps, masks, launch."""

    kernel: Kernel
    ms: float
    bound: str


def predict_kernel(kernel: Kernel, gpu: Gpu, width: str) -> Prediction:
    """Return the time of one launch; ``width``: "16bit" or "fp32"."""
    use = USES[kernel.kind]
    clocks = gpu.multiprocessors * gpu.ghz * 1e6  # of all multiprocessors in a millisecond
    full = kernel.flops / (gpu.tflops[width] * 1e9 * use.compute)
    places = kernel.resident * gpu.multiprocessors
    waves = math.ceil(kernel.tiles / places) if places else 1
    stretched = waves * places / kernel.tiles if places else 1.0
    # Fewer tiles than places: those that share no multiprocessor run at its full rate.
    if places and waves == 1:
        stretched = max(1.0, gpu.multiprocessors / kernel.tiles)
    exponentials = kernel.exponentials / (EXPONENTIALS_A_CLOCK * clocks)
    parts = {
        "compute": full * stretched + exponentials,
        "memory": kernel.bytes / (gpu.gigabytes_per_s * 1e6 * use.memory),
        "steps": waves * kernel.steps * use.step_us * 1e-3,
    }
    masks, start = kernel.drawn / (DRAWN_A_CLOCK * clocks), use.start_us * 1e-3
    within = max(parts.values()) if use.overlaps else sum(parts.values())
    bound = max(parts, key=lambda name: parts[name])
    if bound == "compute" and stretched > 1.25:
        bound = "waves"
    if masks > within:
        bound = "masks"
    if start > max(within, masks):
        bound = "launch"
    return Prediction(kernel, start + within + masks, bound)


def predict(
    case: Any, direction: str, gpu: Gpu, provider: str = OURS
) -> tuple[Prediction, ...] | None:
    """Return the launches of our kernels, or of the frozen layer; None of another provider."""
    if case.op == "lora" and provider == "frozen":
        launches = frozen
    elif provider == OURS:
        launches = FUSED[case.op]
    else:
        return None
    width = tiles.width(case.torch_dtype)
    return tuple(predict_kernel(each, gpu, width) for each in launches(case, direction, gpu.family))


def predicted_ms(row: Row, gpu: str | None = None) -> float | None:
    """Return the time predicted for a row, None where provider or GPU are not modelled.

    Args:
        row: of a case on a GPU.
        gpu: its name; None takes the current device's.
    """
    known = find(gpu)
    if known is None or row.case.suite != GPU:
        return None
    found = predict(row.case, row.direction, known, row.provider)
    return None if found is None else sum(each.ms for each in found)


def measured_rows(gpu: Gpu) -> list[Row]:
    """Return the timed rows of this GPU in ``bench/results``, the last file's of each case."""
    found: dict[tuple[str, str, str], Row] = {}
    for path in sorted(RESULTS.rglob("*.json")):
        content = json.loads(path.read_text())
        if gpu.name not in str(content.get("machine", {}).get("gpu", "")):
            continue
        for each in content.get("rows", ()):
            if isinstance(each, dict) and {"provider", "timing", "case"} <= set(each):
                row = row_of(each)
                if row.status == TIMED:
                    found[row.case.name, row.direction, row.provider] = row
    return list(found.values())


def quality(ratios: Iterable[float]) -> tuple[float, float]:
    """Return the geometric mean of the factors by which predictions are off, and the worst one."""
    off = [abs(math.log(ratio)) for ratio in ratios]
    return math.exp(sum(off) / len(off)), math.exp(max(off))


def report(gpu: Gpu, op: str | None = None, *, kernels: bool = False) -> str:
    """Return the table of one GPU's cases."""
    measured = {
        (row.case.name, row.direction): row.timing.min_ms
        for row in measured_rows(gpu)
        if row.provider == OURS and row.timing is not None
    }
    lines = [f"{'case, direction':<62}{'predicted':>10}{'measured':>10}{'p / m':>7}  bound by"]
    ratios = []
    for method in METHODS.values():
        for case in method.of_suite(GPU, reported=True) if op in (None, method.name) else ():
            for direction in DIRECTIONS:
                found = predict(case, direction, gpu) or ()
                total = sum(each.ms for each in found)
                longest = max(found, key=lambda each: each.ms)
                known = measured.get((case.name, direction))
                if known is not None:
                    ratios.append(total / known)
                shown = f"{'':>17}" if known is None else f"{known:>10.4f}{total / known:>7.2f}"
                lines.append(
                    f"{f'{case.name}, {direction}':<62}{total:>10.4f}{shown}  {longest.bound}"
                )
                lines += [
                    f"    {each.kernel.name:<58}{each.ms:>10.4f}{'':>17}  {each.bound}"
                    for each in (found if kernels else ())
                ]
    if ratios:
        mean, worst = quality(ratios)
        lines.append(
            f"{len(ratios)} measured on {gpu.name}: off by a factor of {mean:.2f} in the geometric "
            f"mean, {worst:.2f} at worst"
        )
    else:
        lines.append(f"nothing of {gpu.name} in bench/results: efficiencies are those of an H200")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table of a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.model")
    parser.add_argument("--gpu", help="a part of its name; by default the current device")
    parser.add_argument("--op", choices=sorted(FUSED))
    parser.add_argument("--kernels", action="store_true", help="launch by launch")
    options = parser.parse_args(arguments)
    gpu = find(options.gpu) or part_of(options.gpu or "")
    if gpu is None:
        parser.error(f"--gpu must be one of {', '.join(each.name for each in GPUS)}")
    print(report(gpu, options.op, kernels=options.kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
