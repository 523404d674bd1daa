"""Whether a tile computes what is right: held against float64 and eager before it is timed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gate import FACTOR
from bench.tuning.candidates import Candidate, Target
from bench.tuning.launches import Launch, tiny, trial
from peft_kernels.core.launches import compiled_kernels


@dataclass(frozen=True)
class Verdict:
    """What became of a trial.

    Attributes:
        problem: why the tile is refused, None where it is not.
        registers: of a thread, at most, over the kernels launched; 0 where Triton interprets.
        spills: likewise.
    """

    problem: str | None
    registers: int = 0
    spills: int = 0


# Of a process whose device answers no more: every later trial there would fail too.
LOST = Verdict("the device was lost")
_lost = threading.Event()


def judge(target: Target, candidate: Candidate, device: torch.device) -> Verdict:
    """Run a candidate at a small form of each case, twice, and at the case, which compiles it.

    On a CPU: at a tiny form of the first one.
    """
    if _lost.is_set():
        return LOST
    on_gpu = device.type == "cuda"
    kernels: list[Any] = []
    try:
        problems = []
        for case in target.cases if on_gpu else target.cases[:1]:
            small = trial(case) if on_gpu else tiny(case)
            problems.append(_problem(target, candidate, small, device, kernels))
            if on_gpu and problems[-1] is None:
                launch = _make(target, case, device, case_dtype(case), True)
                with candidate.forced(), compiled_kernels() as seen:
                    launch.run()
                kernels += seen
                torch.cuda.synchronize(device)
    except Exception as error:  # whatever a tile raises, the others are still tried
        _check(device)
        return Verdict(f"{type(error).__name__}: {str(error)[:200]}")
    registers = max((getattr(kernel, "n_regs", 0) or 0 for kernel in kernels), default=0)
    spills = max((getattr(kernel, "n_spills", 0) or 0 for kernel in kernels), default=0)
    if candidate.tile is not None and not candidate.taken:
        problems.append("no launch took it")
    problem = next((each for each in problems if each is not None), None)
    return Verdict(problem, registers, spills)


def _check(device: torch.device) -> None:
    """Note whether the device is lost: an illegal access ends it for the whole process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        _lost.set()


def _problem(
    target: Target, candidate: Candidate, case: object, device: torch.device, kernels: list[Any]
) -> str | None:
    """Return what is wrong with a candidate's results at a case, or None; append its kernels."""
    ours = _make(target, case, device, case_dtype(case), True)
    _poison(ours.outputs)
    with candidate.forced(), compiled_kernels() as seen:
        ours.run()
        once = [each.clone() for each in ours.outputs]
        ours.run()
    kernels += seen
    problem = _wrong(ours.outputs, *_right(target, case, device))
    if problem is None and not all(map(torch.equal, once, ours.outputs)):
        return "two runs differ"
    return problem


def apart(found: Sequence[Tensor], present: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Return how results differ from the present tile's by more than two roundings, or None.

    Both round the same sums, so that at a size whose truth would take too long this shows a tile
    that is wrong there and nowhere smaller.
    """
    for each, other in zip(found, present, strict=True):
        wide = other.float()
        error = float((each.float() - wide).norm() / wide.norm())
        if not error <= torch.finfo(dtype).eps:
            return f"differs from the present tile's result by {error:.1e}"
    return None


def case_dtype(case: object) -> torch.dtype:
    """Return the dtype that a case names."""
    dtype = getattr(torch, case.dtype)  # type: ignore[attr-defined]
    assert isinstance(dtype, torch.dtype)
    return dtype


def _make(
    target: Target, case: object, device: torch.device, dtype: torch.dtype, ours: bool
) -> Launch:
    return target.make(case, target.launch, device, dtype, ours)


@functools.lru_cache(maxsize=4)
def _right(
    target: Target, case: object, device: torch.device
) -> tuple[list[Tensor], list[Tensor], float]:
    """Return results in float64 and eager's, and the rounding unit of what is computed in."""
    dtype = case_dtype(case)
    made = []
    for each in (torch.float64, dtype):
        launch = _make(target, case, device, each, False)
        launch.run()
        made.append([output.double() for output in launch.outputs])
    return made[0], made[1], torch.finfo(dtype).eps / 2


def _poison(outputs: Sequence[Tensor]) -> None:
    for each in outputs:
        each.fill_(torch.nan)


def _wrong(
    found: Sequence[Tensor], truth: Sequence[Tensor], eager: Sequence[Tensor], unit: float
) -> str | None:
    for number, (ours, right, other) in enumerate(zip(found, truth, eager, strict=True)):
        for what, ord_ in (("error", 2), ("largest error", torch.inf)):
            size = torch.linalg.vector_norm(right, ord_)
            error = float(torch.linalg.vector_norm(ours.double() - right, ord_) / size)
            bound = FACTOR * float(torch.linalg.vector_norm(other - right, ord_) / size) + unit
            if not error <= bound:
                return f"result {number}: {what} {error:.2e} (bound {bound:.2e})"
    return None
