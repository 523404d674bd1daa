"""The demo's figure: loss curves, accuracy, bytes saved for backward."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from peft_kernels.demo.report import MEBIBYTE, Row

# From Okabe and Ito's palette, which colour-blind readers tell apart; also apart in grey.
_BEFORE, _EAGER, _FUSED = "#999999", "#E69F00", "#0072B2"


def png(rows: Sequence[Row], device: str, backend: str) -> bytes:
    """Return the figure as the bytes of a PNG.

    Args:
        rows: what to show.
        device: where it ran, for the title.
        backend: what served the fused layers, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 5))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.15)
    losses, accuracy, saved = figure.subplots(1, 3)
    figure.suptitle(
        f"Digits 0-4 adapted to 5-9, eager PyTorch against peft_kernels ({backend}, {device})"
    )
    _losses(losses, rows[0])
    _bars(
        accuracy,
        rows,
        {
            "before": (_BEFORE, [row.accuracy_before * 100 for row in rows]),
            "eager": (_EAGER, [row.accuracy_eager * 100 for row in rows]),
            "fused": (_FUSED, [row.accuracy_fused * 100 for row in rows]),
        },
        "accuracy on held-out digits 5-9 [%]",
    )
    accuracy.set_title("Accuracy before and after adapting")
    accuracy.set_ylim(0, 119)
    accuracy.set_yticks(range(0, 101, 20))
    _bars(
        saved,
        rows,
        {
            "eager": (_EAGER, [row.saved_bytes_eager / MEBIBYTE for row in rows]),
            "fused": (_FUSED, [row.saved_bytes_fused / MEBIBYTE for row in rows]),
        },
        "bytes saved in one training step [MiB]",
    )
    saved.set_title("Saved for backward, whole model")
    saved.set_ylim(0, saved.get_ylim()[1] * 1.14)
    for axes in (losses, accuracy, saved):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _losses(axes: Any, row: Row) -> None:
    steps = range(1, len(row.losses_eager) + 1)
    axes.plot(steps, row.losses_eager, color=_EAGER, linewidth=5, alpha=0.7, label="eager")
    axes.plot(steps, row.losses_fused, color=_FUSED, linewidth=1.5, label="fused")
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy [nat]")
    axes.set_ylim(bottom=0)
    difference = row.largest_loss_difference
    note = "" if difference is None else f"\nlargest difference {difference:.1e}"
    axes.set_title(f"Training loss, {row.name}{note}")
    axes.legend(frameon=False)


def _bars(
    axes: Any, rows: Sequence[Row], series: dict[str, tuple[str, list[float]]], label: str
) -> None:
    width = 0.8 / len(series)
    for index, (name, (color, values)) in enumerate(series.items()):
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(rows))]
        bars = axes.bar(places, values, width * 0.92, color=color, label=name)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=6)
    axes.set_xticks(range(len(rows)), [row.name.replace(", ", "\n") for row in rows], fontsize=8)
    axes.set_ylabel(label)
    axes.legend(frameon=False, ncols=len(series), loc="upper center")
