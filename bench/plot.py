"""Bars of the times over the base's, from a file that ``bench.run`` wrote.

The base is the frozen layer where a method has one, else the fastest eager form.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# One colour a provider in every figure, distinguishable without colour vision.
_COLOURS = {
    "eager": "#b0b0b0",
    "peft": "#606060",
    "factored": "#e69f00",
    "compile": "#56b4e9",
    "fused": "#0072b2",
}


def plot(source: Path, target: Path) -> Path:
    """Draw the ratios of every timed row in ``source``, a panel a method and direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(source.read_text(encoding="utf-8"))
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        timed = row["ratio_eager"] and row["provider"] != "frozen"
        if timed and row["case"]["suite"] != "host":
            panels.setdefault((row.get("op", "lora"), row["direction"]), []).append(row)
    if not panels:
        raise ValueError(f"{source} holds no row with a ratio")
    most = max(len({row["case"]["name"] for row in rows}) for rows in panels.values())
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(max(6.0, 1.5 * most + 2), 3.8 * len(panels)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    legend: dict[str, Any] = {}
    for axis, ((op, direction), rows) in zip(axes[:, 0], panels.items(), strict=True):
        cases = list(dict.fromkeys(row["case"]["name"] for row in rows))
        _bars(axis, cases, rows)
        axis.set_title(f"{op}, {direction}", loc="left", fontsize=10)
        axis.set_xticks(range(len(cases)), [name.replace(" ", "\n") for name in cases])
        axis.tick_params(axis="x", labelsize=8)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(
        legend.values(), legend, loc="outside upper right", ncols=len(legend), frameon=False
    )
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
    base = "frozen" if any(row["ratio_frozen"] for row in rows) else "eager"
    for index, provider in enumerate(providers):
        mine = {r["case"]["name"]: r[f"ratio_{base}"] for r in rows if r["provider"] == provider}
        places = [i + (index - (len(providers) - 1) / 2) * width for i in range(len(cases))]
        heights = [mine.get(name, 0.0) for name in cases]
        bars = axis.bar(places, heights, width * 0.92, label=provider, color=_COLOURS.get(provider))
        axis.bar_label(
            bars, [f"{height:.2f}" if height else "" for height in heights],
            fontsize=6, rotation=90, padding=2,
        )  # fmt: skip
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_ylabel(f"time / {base}")
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
