"""Bytes saved for backward beyond x and the parameters, bars of every provider."""

from __future__ import annotations

from typing import Any

from bench.method import MEMORY, MIB
from bench.plots import style
from bench.plots.style import Row
from bench.rows import FAILED

_INCHES_A_BAR, _INCHES_A_PANEL = 0.22, 0.6
# Less than this is told in words.
_LEAST_BYTES = MIB // 100


def draw(content: dict[str, Any]) -> Any:
    """Return the figure, a panel a method, or None where nothing was counted."""
    panels, small = {}, ""
    for op in dict.fromkeys(style.op_of(row) for row in content["rows"]):
        counted = bars([row for row in content["rows"] if style.op_of(row) == op])
        most = max((saved for each in counted.values() for saved in each.values()), default=0)
        if most >= _LEAST_BYTES:
            panels[op] = counted
        elif counted:
            small += f"; {op}: at most {most} bytes by any"
    if not panels:
        return None
    import matplotlib.pyplot as plt

    styles = style.styles(content, content["rows"])
    heights = [sum(len(each) + 1 for each in counted.values()) for counted in panels.values()]
    tall = sum(heights) * _INCHES_A_BAR + len(panels) * _INCHES_A_PANEL + 1.0
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9.0, tall), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    legend: dict[str, Any] = {}
    for axis, (op, counted) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, op, counted, styles)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    axes[-1, 0].set_xlabel("MiB", fontsize=9)
    names = [style.label(name) for name in styles if style.label(name) in legend]
    figure.legend(
        [legend[name] for name in names], names, loc="outside lower center", frameon=False,
        ncols=min(len(names), 6), fontsize=9,
    )  # fmt: skip
    figure.suptitle(
        style.title(content, f"Saved for backward beyond x and the parameters{small}"),
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def bars(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Return bytes by case and provider: of the cases counted for it, else of those timed."""
    counted = [
        row
        for row in style.first_rows(rows)
        if row["saved_bytes"] is not None and row["status"] != FAILED
        and row["provider"] != "frozen"
    ]  # fmt: skip
    of_memory = [row for row in counted if row["case"]["suite"] == MEMORY]
    found: dict[str, dict[str, int]] = {}
    for row in of_memory or style.timed(counted):
        found.setdefault(row["case"]["name"], {})[row["provider"]] = row["saved_bytes"]
    return found


def _panel(
    axis: Any, op: str, counted: dict[str, dict[str, int]], styles: dict[str, tuple[str, str]]
) -> None:
    place, middles = 0.0, []
    for saved in counted.values():
        first = place
        for provider, (colour, _) in styles.items():
            if provider not in saved:
                continue
            mib = saved[provider] / MIB
            axis.barh(place, mib, height=0.85, color=colour, label=style.label(provider))
            axis.annotate(
                f"{mib:.2f}" if mib >= 0.01 else f"{saved[provider]} bytes", (mib, place), (4, 0),
                textcoords="offset points", fontsize=7.5, va="center",
            )  # fmt: skip
            place += 1.0
        middles.append((first + place - 1.0) / 2)
        place += 1.0
    axis.set_yticks(middles, [style.short(name, op) for name in counted])
    axis.set_ylim(place - 1.2, -0.8)
    axis.margins(x=0.12)
    axis.set_title(op, loc="left", fontsize=9, weight="bold")
    axis.tick_params(labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
