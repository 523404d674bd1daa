"""Our speed-up over each baseline against the cases, a row of panels a method."""

from __future__ import annotations

from typing import Any

from bench.method import DIRECTIONS, OURS
from bench.plots import style
from bench.plots.style import Row

_FINE = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0)
_COARSE = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
_WIDE = (1.0, 3.0)
_INCHES_A_CASE, _INCHES_A_PANEL = 0.27, 0.75


def draw(content: dict[str, Any]) -> Any:
    """Return the figure, or None without a case that ours and another were timed at."""
    rows = style.timed(content["rows"])
    panels = {}
    for op, suite in dict.fromkeys((style.op_of(row), row["case"]["suite"]) for row in rows):
        mine = [row for row in rows if (style.op_of(row), row["case"]["suite"]) == (op, suite)]
        if any(points(mine, direction) for direction in DIRECTIONS):
            panels[op, suite] = mine
    if not panels:
        return None
    import matplotlib.pyplot as plt

    styles = style.styles(content, rows)
    cases = {key: _cases(mine, content["rows"], *key) for key, mine in panels.items()}
    heights = [max(2, len(each)) for each in cases.values()]
    tall = sum(heights) * _INCHES_A_CASE + len(panels) * _INCHES_A_PANEL + 1.1
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(11.5, tall), squeeze=False, sharey="row",
        sharex="row", layout="constrained", gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for line, (op, suite) in zip(axes, panels, strict=True):
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            names = cases[op, suite]
            broken = style.failed(content["rows"], op, suite, direction)
            _panel(axis, names, points(panels[op, suite], direction), broken, styles)
            axis.set_title(f"{op}, {suite}: {direction}", loc="left", fontsize=9, weight="bold")
        line[0].set_yticks(range(len(names)), [style.short(name, op) for name in names])
    _legend(figure, styles)
    figure.suptitle(
        style.title(content, "Speed-up of peft_kernels: least time of each baseline over ours"),
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def points(rows: list[Row], direction: str) -> dict[str, dict[str, float]]:
    """Return by provider and case how many times faster ours is."""
    least = {
        (row["provider"], row["case"]["name"]): row["timing"]["min_ms"]
        for row in rows
        if row["direction"] == direction
    }
    found: dict[str, dict[str, float]] = {}
    for (provider, case), ms in least.items():
        if provider != OURS and (OURS, case) in least:
            found.setdefault(provider, {})[case] = ms / least[OURS, case]
    return found


def _cases(rows: list[Row], everything: list[Row], op: str, suite: str) -> list[str]:
    """Return the names of cases, those at which ours failed among them, in the file's order."""
    broken = [name for each in DIRECTIONS for name in style.failed(everything, op, suite, each)]
    known = {row["case"]["name"] for row in rows} | set(broken)
    return [
        name for name in dict.fromkeys(row["case"]["name"] for row in everything) if name in known
    ]


def _panel(
    axis: Any, names: list[str], found: dict[str, dict[str, float]], broken: list[str],
    styles: dict[str, tuple[str, str]],
) -> None:  # fmt: skip
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.grid(axis="both", color="#e8e8e8", linewidth=0.6)
    axis.set_axisbelow(True)
    for provider, (colour, marker) in styles.items():
        mine = found.get(provider, {})
        places = [names.index(name) for name in mine]
        size = 60 if marker == "|" else 34
        axis.scatter(
            list(mine.values()), places, s=size, color=colour, marker=marker, zorder=3,
            linewidths=1.6 if marker == "|" else 0.4,
            edgecolors=None if marker == "|" else "white",
        )  # fmt: skip
    right = axis.get_yaxis_transform()
    head = "over eager\nor peft" if "peft" in found else "over\neager"
    axis.text(1.02, -1.0, head, transform=right, fontsize=7, va="center")
    for place, name in enumerate(names):
        forms = [found[each][name] for each in ("eager", "peft") if name in found.get(each, {})]
        words = "failed" if name in broken else f"{min(forms):.2f}" if forms else "-"
        axis.text(1.02, place, words, transform=right, fontsize=7.5, va="center")
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(labelsize=8)
    low, high = axis.get_xlim()
    subs = _FINE if high < 3.5 * low else _COARSE if high < 40 * low else _WIDE
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, styles: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], linestyle="", color=colour, marker=marker, markersize=7,
            markeredgewidth=1.6 if marker == "|" else 0.4, label=style.label(name),
        )
        for name, (colour, marker) in styles.items()
        if name != OURS
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False,
        fontsize=9, title="ours is this many times faster than", title_fontsize=9,
    )  # fmt: skip
