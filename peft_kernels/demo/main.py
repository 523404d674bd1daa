"""The demo as a command: what must be installed, interruptions, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from peft_kernels.demo import options

# Import name -> name to install.
_REQUIRED = {
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}


class _Stopped(BaseException):
    """A signal asked to end; no ``except Exception`` on the way may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the options; None takes the command line's.

    Returns:
        The exit status: 0; 1 when the demo did not show what it should; 2 for bad options or
        missing packages; 128 + the number of the signal that ended it.
    """
    given = options.parse(argv)
    try:
        with _stoppable():
            return _run(given)
    except _Stopped as stopped:
        name = signal.Signals(stopped.number).name
        print(f"demo: stopped by {name}; nothing half-written is left", file=sys.stderr)
        return 128 + stopped.number


def _run(given: argparse.Namespace) -> int:
    missing = _missing()
    if missing:
        print(
            f"demo: {', '.join(missing)} cannot be imported; "
            "to install what the demo needs: pip install peft_kernels[demo]",
            file=sys.stderr,
        )
        return 2
    from peft_kernels.core.backend import BackendUnavailable, demanded
    from peft_kernels.demo import story

    try:
        demanded(None)
        settings = options.resolve(given)
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    try:
        story.tell(settings)
    except (BackendUnavailable, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except story.DemoFailed as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    return 0


def _missing() -> list[str]:
    missing = []
    for module, package in _REQUIRED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    return missing


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into ``_Stopped``, once: cleaning up is not interrupted again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
