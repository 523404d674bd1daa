"""Processes that compile and try candidates ahead of the one that times them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from bench.tuning.candidates import Candidate, Target
from bench.tuning.trial import LOST, Verdict, judge

TRIES = 2  # of a candidate whose process died, perhaps of another one
PATIENCE_S = 60.0  # for one trial: a launch that waits for itself never ends


class Judges:
    """Processes that compile and try candidates, so that a crash costs them and not the results."""

    def __init__(self, workers: int, device: torch.device) -> None:
        """Start nothing yet; without workers, trials run in this process when asked for."""
        self.workers, self.device = workers, device
        self.waiting: dict[tuple[Target, Candidate], Future[Verdict]] = {}
        self.pool: ProcessPoolExecutor | None = None

    def ask(self, target: Target, chosen: Sequence[Candidate]) -> None:
        """Have candidates tried, in this order."""
        for candidate in chosen if self.workers else ():
            self._submit(target, candidate)

    def answer(self, target: Target, candidate: Candidate, ends: float) -> Verdict:
        """Return what became of a trial, a refusal where that took too long or its process died."""
        if not self.workers:
            return judge(target, candidate, self.device)
        key = (target, candidate)
        for _ in range(TRIES):
            left = max(0.0, ends - time.monotonic())
            try:
                verdict = self.waiting[key].result(min(left, PATIENCE_S))
            except TooLate:
                late = self.waiting.pop(key)
                if left <= PATIENCE_S:
                    late.cancel()
                    return Verdict("not tried: no time left")
                self._again()
                return Verdict(f"its trial did not end within {PATIENCE_S:.0f} s")
            except BrokenProcessPool:
                verdict = LOST
            if verdict != LOST:
                del self.waiting[key]
                return verdict
            self._again()
        del self.waiting[key]
        return Verdict("the trial's process died, as did another one beside it")

    def _again(self) -> None:
        """Try all that has not ended once more in new processes: which one failed is not known."""
        self.end()
        for (target, candidate), future in list(self.waiting.items()):
            if not future.done() or future.cancelled() or _lost(future):
                self._submit(target, candidate)

    def end(self) -> None:
        """End the processes and what they have not begun."""
        if self.pool is None:
            return
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        self.pool = None

    def _submit(self, target: Target, candidate: Candidate) -> None:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
        try:
            future = self.pool.submit(judge, target, candidate, self.device)
        except BrokenProcessPool:
            future = Future()
            future.set_result(LOST)
        self.waiting[target, candidate] = future


def _lost(future: Future[Verdict]) -> bool:
    return future.exception() is not None or future.result() == LOST
