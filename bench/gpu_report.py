"""``make gpu-report``: build, test, check and time on a machine with an NVIDIA GPU, stage by stage.

Needs no network and no installed peft_kernels: torch, Triton, pytest, and for the compiled kernels
nvcc, a compiler, ninja and pybind11. STAGE names what to run, by comma or space, each with seconds
of its own if wanted ("tests lora:120"); none: all. "timing" is the four methods. What is missing or
stale of the compiled kernels is built first. Every stage leaves NAME.json and NAME.log in $OUT
(out/gpu-report/), ends by itself in less than nine minutes (LIMIT_S: in less than that), and prints
a short table last. COMMIT says what commit this is where there is no .git.
DRY_RUN=1 walks the same way without a GPU, in Triton's interpreter.

Exit status: 0; 1 if a stage failed or died, which its line at the end says; 2 without a GPU, for an
unknown name, or where nothing can be written to $OUT.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.stages import end_all  # noqa: E402 -- the path comes first

MOST_S = 530.0  # of any stage
TIMING = "timing"
Run = Callable[[Any], None]


def stages(dry: bool) -> dict[str, tuple[Run, float]]:
    """Return what there is: how each stage runs, and the seconds it may take, in order."""
    from bench.report import sanitizer, testing, timing, training, tuning

    modules: tuple[Any, ...] = (training, sanitizer, tuning)
    whole: dict[str, tuple[Run, float]] = {}
    whole[testing.NAME] = testing.run, testing.DRY_SECONDS if dry else testing.SECONDS
    for name in timing.NAMES:
        seconds = timing.SECONDS.get(name, timing.OTHERS_S)
        whole[name] = timing.run, timing.DRY_SECONDS if dry else seconds
    for module in modules:
        whole[module.NAME] = module.run, module.DRY_SECONDS if dry else module.SECONDS
    return whole


def chosen(asked: str, dry: bool, limit_s: float | None) -> list[tuple[str, Run, float]]:
    """Return the stages that ``asked`` names, with their seconds.

    Raises:
        ValueError: an unknown name, or no number of seconds.
    """
    from bench.report import timing

    known = stages(dry)
    found: dict[str, float] = {}
    for word in re.findall(r"[^\s,]+", asked) or known:
        name, _, given = word.partition(":")
        for each in timing.NAMES if name == TIMING else (name,):
            if each not in known:
                raise ValueError(f"stages are {', '.join(known)} and {TIMING}, got {each}")
            wanted = seconds_of(word, given) if given else known[each][1]
            found[each] = min(wanted, MOST_S, limit_s or MOST_S)
    return [(name, known[name][0], seconds) for name, seconds in found.items()]


def seconds_of(word: str, given: str) -> float:
    """Return the seconds that ``given`` says.

    Raises:
        ValueError: no number above 0.
    """
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a number above 0, got {word}")
    return seconds


def run_one(
    name: str, run: Run, out: Path, dry: bool, seconds: float, machine: dict[str, Any]
) -> dict[str, Any]:
    """Run a stage and return what its file holds; one that raises is a stage that failed."""
    from bench.report.stage import Stage

    print(f"\n=== {name}, at most {seconds:.0f} s", flush=True)
    stage = Stage(name, out, dry, seconds, machine)
    try:
        run(stage)
    except Exception as error:
        with stage.log.open("a", encoding="utf-8") as log:
            log.write(traceback.format_exc())
        stage.end(False, f"died: {type(error).__name__}: {error}"[:200])
    print(f"{name}: {stage.content['ended']}, {stage.out / name}.json", flush=True)
    return stage.content


def main(names: Sequence[str] = ()) -> int:
    """Run the stages of ``names`` or STAGE, print how each ended, return the exit status."""
    import torch

    from bench import store
    from bench.report import building
    from bench.report.text import ending

    dry = os.environ.get("DRY_RUN", "0") not in ("", "0")
    limit = os.environ.get("LIMIT_S")
    try:
        limit_s = seconds_of(f"LIMIT_S={limit}", limit) if limit else None
        asked = chosen(" ".join(names) or os.environ.get("STAGE", ""), dry, limit_s)
    except ValueError as error:
        print(f"gpu-report: {error}", file=sys.stderr)
        return 2
    if not dry and not torch.cuda.is_available():
        print(
            f"gpu-report: torch {torch.__version__} finds no NVIDIA GPU here. DRY_RUN=1 walks the "
            "report without one.",
            file=sys.stderr,
        )
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-report").resolve()
    if problem := store.why_not_writable(out):
        print(f"gpu-report: {problem}", file=sys.stderr)
        return 2
    machine = store.machine(torch.device("cpu" if dry else "cuda"))
    ended = []
    why = building.why_build(dry)
    if why:
        print(f"build: {why}", flush=True)
        seconds = min(building.SECONDS, limit_s or MOST_S)
        ended.append(run_one(building.NAME, building.run, out, dry, seconds, machine))
    for name, run, seconds in asked:
        ended.append(run_one(name, run, out, dry, seconds, machine))
    print(ending(ended, machine, dry))
    return 0 if all(each["ok"] for each in ended) else 1


def _terminated(number: int, frame: object) -> None:
    end_all()
    sys.exit(128 + number)


if __name__ == "__main__":
    # Commands are sessions of their own: no signal to the report reaches them.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _terminated)
    sys.exit(main(sys.argv[1:]))
