"""One stage of the GPU report as it runs: its clock, its file, its log, and the commands it runs.

A stage leaves two files in OUT, ``NAME.json``, rewritten whenever something is found, so that what
ends it early loses nothing, and ``NAME.log``, with the output of everything it ran.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from bench import store
from bench.stages import Finished, run_stage

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_LOG_BYTES = 400_000  # the end says more than the middle
NOT_DROPPED = "PEFT_KERNELS_COMMIT"


def environment(dry: bool) -> dict[str, str]:
    """Return what every command runs in: this tree, and no setting of the caller's."""
    dropped = ("PEFT_KERNELS_", "PYTEST_", "TRITON_INTERPRET")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == NOT_DROPPED or not name.startswith(dropped)
    }
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    # Which plugins a machine happens to have must not decide how the tests run.
    given = {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if dry:
        # Interpreted kernels are Python: a second thread would only wait.
        given |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept | given


class Stage:
    """A stage's name, its clock, and what it has found so far.

    Attributes:
        name: of the stage and of its files.
        out: the folder of the files.
        dry: whether there is no GPU, and everything is tiny.
        content: what ``NAME.json`` holds.
    """

    def __init__(
        self, name: str, out: Path, dry: bool, seconds: float, machine: dict[str, Any]
    ) -> None:
        """Start the clock, and begin the file and the log anew."""
        self.name, self.out, self.dry = name, out, dry
        self.started = time.monotonic()
        self.ends = self.started + seconds
        self.log = out / f"{name}.log"
        self.log.write_bytes(b"")
        self.content: dict[str, Any] = {
            "format": 2, "stage": name, "dry_run": dry, "machine": machine, "complete": False,
            "ok": False, "ended": "did not end",
        }  # fmt: skip
        self.add()

    def left(self) -> float:
        """Return the seconds left."""
        return self.ends - time.monotonic()

    def add(self, **found: Any) -> None:
        """Take in what was found and write the file."""
        self.content |= found
        store.replace(self.out / f"{self.name}.json", self.content)

    def end(self, ok: bool, ended: str) -> None:
        """Write the last word on this stage, and keep its log small."""
        seconds = round(time.monotonic() - self.started, 1)
        self.add(complete=True, ok=ok, ended=ended, seconds=seconds)
        text = self.log.read_bytes()
        if len(text) > MOST_LOG_BYTES:
            head, tail = text[: MOST_LOG_BYTES // 8], text[-MOST_LOG_BYTES * 7 // 8 :]
            self.log.write_bytes(head + b"\n... cut ...\n" + tail)

    def show(self, text: str) -> None:
        """Print the stage's table, and keep it at the end of the log."""
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def run(
        self,
        what: str,
        command: list[str],
        seconds: float,
        *,
        patience_s: float = 0.0,
        log: Path | None = None,
        program: str = sys.executable,
        quiet: bool = False,
        **given: str,
    ) -> Finished:
        """Run a program within what is left of the time, and say how it ended.

        Args:
            what: it is called in the output.
            command: the program's arguments.
            seconds: its limit.
            patience_s: this long before the limit it is interrupted.
            log: takes its output instead of the stage's own, for commands side by side.
            program: what is run: this Python.
            quiet: do not say how it ended.
            given: more of its environment.
        """
        if log is None:
            print(f"{what} ...", flush=True)
        limit = min(seconds, self.left())
        done = run_stage(
            [program, *command], log or self.log, limit, environment(self.dry) | given, ROOT,
            patience_s,
        )  # fmt: skip
        if not quiet:
            print(f"{what}: {done}" + ("" if log else f", log in {self.log}"), flush=True)
        return done
