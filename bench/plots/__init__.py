"""Figures of a file that ``bench.run`` wrote: speed-up, roofline, bytes saved for backward.

A row whose numbers are wrong, or that did not run, is not drawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.plots import roofline, saved, speed_up

FIGURES = {"speedup": speed_up.draw, "roofline": roofline.draw, "saved": saved.draw}


def draw(source: Path, folder: Path) -> list[Path]:
    """Draw what ``source`` has rows for into ``folder``; return the files, named as it is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw_one in FIGURES.items():
        figure = draw_one(content)
        if figure is None:
            continue
        target = folder / f"{source.stem}-{name}.png"
        part = target.with_name(f".{target.name}")
        figure.savefig(part, dpi=130, format="png")
        plt.close(figure)
        part.replace(target)
        written.append(target)
    return written
