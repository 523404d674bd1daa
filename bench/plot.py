"""Bars of the times over the frozen layer's, from a file that ``bench.run`` wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# One colour a provider in every figure, distinguishable without colour vision.
_COLOURS = {"eager": "#b0b0b0", "factored": "#e69f00", "compile": "#56b4e9", "fused": "#0072b2"}


def plot(source: Path, target: Path) -> Path:
    """Draw the ratios to the frozen layer of every timed row in ``source``; return ``target``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(source.read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if row["ratio_frozen"] and row["provider"] != "frozen"]
    rows = [row for row in rows if row["case"]["suite"] != "host"]
    if not rows:
        raise ValueError(f"{source} holds no row with a ratio to the frozen layer")
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    cases = list(dict.fromkeys(row["case"]["name"] for row in rows))
    figure, axes = plt.subplots(
        len(directions), 1, figsize=(max(6.0, 1.5 * len(cases) + 2), 3.4 * len(directions)),
        squeeze=False, sharex=True, layout="constrained",
    )  # fmt: skip
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        _bars(axis, cases, [row for row in rows if row["direction"] == direction])
        axis.set_title(direction, loc="left", fontsize=10)
    axes[-1, 0].set_xticks(range(len(cases)), [name.replace(" ", "\n") for name in cases])
    axes[-1, 0].tick_params(axis="x", labelsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(_title(content["machine"]), fontsize=9, x=0.01, ha="left")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}")
    figure.savefig(part, dpi=130, format="png")
    plt.close(figure)
    part.replace(target)
    return target


def _bars(axis: Any, cases: list[str], rows: list[dict[str, Any]]) -> None:
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        mine = {r["case"]["name"]: r["ratio_frozen"] for r in rows if r["provider"] == provider}
        places = [i + (index - (len(providers) - 1) / 2) * width for i in range(len(cases))]
        heights = [mine.get(name, 0.0) for name in cases]
        bars = axis.bar(places, heights, width * 0.92, label=provider, color=_COLOURS.get(provider))
        axis.bar_label(
            bars, [f"{height:.2f}" if height else "" for height in heights],
            fontsize=6, rotation=90, padding=2,
        )  # fmt: skip
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_ylabel("time / frozen linear")
    axis.margins(y=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def _title(machine: dict[str, Any]) -> str:
    name = machine.get("gpu") or machine["cpu"]
    commit = (machine["commit"] or "no commit")[:10] + (" (dirty)" if machine["dirty"] else "")
    return f"{name}, torch {machine['torch']}, {commit}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bench.plot RESULT.json FIGURE.png")
    print(plot(Path(sys.argv[1]), Path(sys.argv[2])))
