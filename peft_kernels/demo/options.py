"""What the command line decides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PRETRAIN_STEPS, _STEPS = 150, 100
_QUICK_PRETRAIN_STEPS, _QUICK_STEPS = 20, 12
_MOST_SEED = 2**32 - 1  # numpy's limit


@dataclass(frozen=True)
class Settings:
    """The settings of one run."""

    out: Path
    seed: int
    pretrain_steps: int
    steps: int
    rank: int
    device: torch.device
    dtype: torch.dtype
    dropout: float
    quiet: bool

    @property
    def alpha(self) -> float:
        """The numerator of the adapter's scaling: twice the rank, as is usual."""
        return 2.0 * self.rank

    def as_json(self) -> dict[str, Any]:
        """Return the settings as what JSON can hold."""
        entries = {**vars(self), "alpha": self.alpha}
        return {
            key: value if isinstance(value, int | float) else str(value).removeprefix("torch.")
            for key, value in entries.items()
        }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, unless they are wrong or ask for help: then the process ends."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels demo",
        description="Pre-train a small transformer on handwritten digits 0-4, freeze it and adapt "
        "it to 5-9, in eager PyTorch and on the fused kernels from the same initial state. Prints "
        "a table; writes demo.png, demo.json and the adapter.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few steps only: a few seconds")
    add("--out", type=Path, default=Path("out/demo"), help="folder to write (%(default)s)")
    add(
        "--seed",
        type=_whole_number(0, _MOST_SEED),
        default=0,
        help="same seed, same numbers, times apart (%(default)s)",
    )
    add(
        "--steps",
        type=_whole_number(1),
        help=f"steps of adapting ({_STEPS}; with --quick {_QUICK_STEPS})",
    )
    add("--rank", type=_whole_number(1), default=8, help="rank of the adapter (%(default)s)")
    add("--device", help="cpu, cuda or cuda:N (the first GPU, where there is one)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the frozen model; the adapter is float32 (%(default)s)",
    )
    add(
        "--dropout",
        type=_probability,
        default=0.1,
        metavar="P",
        help="adapt a second time with this dropout; 0 leaves that out (%(default)s)",
    )
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def resolve(options: argparse.Namespace) -> Settings:
    """Return the settings that parsed options mean on this machine.

    Raises:
        ValueError: a device that is not there.
    """
    import torch

    pretrain_steps, steps = _PRETRAIN_STEPS, _STEPS
    if options.quick:
        pretrain_steps, steps = _QUICK_PRETRAIN_STEPS, _QUICK_STEPS
    return Settings(
        out=options.out,
        seed=options.seed,
        pretrain_steps=pretrain_steps,
        steps=options.steps or steps,
        rank=options.rank,
        device=_device(options.device),
        dtype=getattr(torch, options.dtype),
        dropout=options.dropout,
        quiet=options.quiet,
    )


def _device(text: str | None) -> torch.device:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        return torch.device("cuda" if count else "cpu")
    kind, colon, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not index.isdecimal()):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"--device {text}: torch sees {count} CUDA devices; try --device cpu")
    return torch.device(text)


def _whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        end = "or more" if most is None else f"to {most}"
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} {end}, got {text!r}")
        return int(text)

    return parse


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text!r}")
    return value
