"""What the demo leaves behind: the table, the files, the figure."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MEBIBYTE = 2**20
_PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib", "safetensors")


@dataclass(frozen=True)
class Row:
    """The figures of one method: one line of the table, one object of the JSON.

    Attributes:
        name: the method, with its dropout where there is any.
        dropout: drop probability.
        trainable_share: trained parameters / all parameters.
        accuracy_before: on the held-out images, before adapting.
        accuracy_eager: after adapting, eager form.
        accuracy_fused: after adapting, fused form.
        ms_per_step_eager: median wall time of a whole training step.
        ms_per_step_fused: likewise.
        saved_bytes_eager: what one step of the whole model keeps for backward.
        saved_bytes_fused: likewise.
        largest_loss_difference: over all steps; None where the two draw different dropout masks.
        losses_eager: the loss at every step.
        losses_fused: likewise.
    """

    name: str
    dropout: float
    trainable_share: float
    accuracy_before: float
    accuracy_eager: float
    accuracy_fused: float
    ms_per_step_eager: float
    ms_per_step_fused: float
    saved_bytes_eager: int
    saved_bytes_fused: int
    largest_loss_difference: float | None
    losses_eager: list[float]
    losses_fused: list[float]


_HEAD = (
    ("", "trainable", "accuracy on 5-9", "", "", "ms/step", "", "saved, MiB", "", "largest loss"),
    ("method", "share", "before", "eager", "fused", "eager", "fused", "eager", "fused",
     "difference"),
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return the table as text of less than 100 columns."""
    lines = [*_HEAD, *(_cells(row) for row in rows)]
    # A heading over several columns must not widen the first of them.
    widths = [max(len(line[column]) for line in lines[1:]) for column in range(len(_HEAD[1]))]
    widths[1], widths[-1] = max(widths[1], len(_HEAD[0][1])), max(widths[-1], len(_HEAD[0][-1]))
    over = (
        f"{'':{widths[0]}}  {_HEAD[0][1]:>{widths[1]}}   "
        f"{_HEAD[0][2]:^{sum(widths[2:5]) + 4}}   {_HEAD[0][5]:^{sum(widths[5:7]) + 2}}   "
        f"{_HEAD[0][7]:^{sum(widths[7:9]) + 2}}   {_HEAD[0][9]:>{widths[9]}}"
    )
    text = [over]
    for index, line in enumerate(lines[1:]):
        cells = [f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)]
        cells[0] = f"{line[0]:<{widths[0]}}"
        groups = (cells[:2], cells[2:5], cells[5:7], cells[7:9], cells[9:])
        text.append("   ".join("  ".join(group) for group in groups))
        if index == 0:
            text.append("-" * len(text[-1]))
    if any(row.largest_loss_difference is None for row in rows):
        text.append(
            "*: eager and fused draw different dropout masks: their results differ by chance"
        )
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    difference = row.largest_loss_difference
    return (
        row.name,
        f"{row.trainable_share:.1%}",
        f"{row.accuracy_before:.1%}",
        f"{row.accuracy_eager:.1%}",
        f"{row.accuracy_fused:.1%}",
        f"{row.ms_per_step_eager:.1f}",
        f"{row.ms_per_step_fused:.1f}",
        f"{row.saved_bytes_eager / MEBIBYTE:.2f}",
        f"{row.saved_bytes_fused / MEBIBYTE:.2f}",
        "*" if difference is None else f"{difference:.1e}",
    )


def machine(device: Any) -> dict[str, Any]:
    """Return what the figures were measured on and with.

    Args:
        device: the torch.device that was used.
    """
    import torch

    from peft_kernels.version import __version__

    versions = {"peft_kernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": versions,
        "system": platform.platform(),
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
    }
