"""Run a command with a time limit, ending everything it started."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_running: set[int] = set()


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """End this process, saying where it was, if what is within takes longer.

    A hung kernel is waited for in C, where no signal handler of Python's runs.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def end_all() -> None:
    """End every running stage with all it started; for a signal handler."""
    for group in tuple(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def _heed_interrupts() -> None:
    # A job started in the background of a shell is handed down SIGINT as ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit status (negative: a signal), None if its time ran out."""

    status: int | None
    seconds: float

    def __str__(self) -> str:
        """Return it in words."""
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s"
        if self.status < 0:
            return f"killed by signal {-self.status} after {self.seconds:.0f} s"
        return f"exit status {self.status} after {self.seconds:.0f} s"


def run_stage(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str],
    folder: Path,
    patience_s: float = 0.0,
) -> Finished:
    """Run ``command`` in a process group of its own, which is ended with it.

    Args:
        command: the program and its arguments.
        log: file that takes its output, after what it holds.
        seconds: its limit; after it the group is killed.
        environment: all of its environment.
        folder: its working directory.
        patience_s: this long before the limit it is interrupted, so that it can write its results.
    """
    start = time.monotonic()
    status: int | None = None
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=dict(environment), cwd=folder, start_new_session=True, preexec_fn=_heed_interrupts,
        )  # fmt: skip
        _running.add(process.pid)
        try:
            status = process.wait(max(0.1, seconds - patience_s))
        except subprocess.TimeoutExpired:
            if patience_s:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _running.discard(process.pid)
    return Finished(status, round(time.monotonic() - start, 1))
