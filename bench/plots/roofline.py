"""Achieved FLOP/s against arithmetic intensity, under the peaks of the same run."""

from __future__ import annotations

from typing import Any

from bench.method import OURS, SHORT
from bench.methods import METHODS
from bench.plots import style
from bench.plots.style import Row
from bench.roofline import Peaks

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


def draw(content: dict[str, Any]) -> Any:
    """Return the figure, a panel a device and dtype, or None without rows or peaks."""
    rows = style.timed(content["rows"])
    peaks = _peaks(content)
    panels = {
        key: mine
        for key in peaks
        if (mine := [row for row in rows if (row["case"]["suite"], row["case"]["dtype"]) == key])
    }
    if not panels:
        return None
    import matplotlib.pyplot as plt

    styles = style.styles(content, rows)
    ops = list(dict.fromkeys(style.op_of(row) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.0 + 6.2 * len(panels), 5.6), squeeze=False, layout="constrained"
    )
    for axis, (key, mine) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, peaks[key], mine, styles, ops)
        axis.set_title(f"{key[0]}, {SHORT[key[1]]}", loc="left", fontsize=9, weight="bold")
    axes[0, 0].set_ylabel("achieved GFLOP/s", fontsize=9)
    _legend(figure, styles, ops)
    figure.suptitle(
        style.title(content, "Roofline: least counted work over the least time taken"),
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _peaks(content: dict[str, Any]) -> dict[tuple[str, str], Peaks]:
    """Return peaks by suite and dtype; older files do not say the suite: the first is the rows'."""
    found: dict[tuple[str, str], Peaks] = {}
    rows = style.timed(content["rows"])
    unnamed = rows[0]["case"]["suite"] if rows else ""
    for each in content["peaks"]:
        fields = dict(each)
        suite = fields.pop("suite", unnamed)
        found.setdefault((suite, each["dtype"]), Peaks(**fields))
    return found


def point(row: Row) -> tuple[float, float] | None:
    """Return FLOPs a byte and GFLOP/s of a timed row; None of one that computes nothing."""
    method = METHODS[style.op_of(row)]
    work = method.work(method.case_type(**row["case"]), row["direction"], row["provider"])
    if work.flops == 0:
        return None
    return work.flops / work.bytes, work.flops / (1e6 * row["timing"]["min_ms"])


def _panel(
    axis: Any, peaks: Peaks, rows: list[Row], styles: dict[str, tuple[str, str]], ops: list[str]
) -> None:
    for provider, (colour, _) in styles.items():
        ours = provider == OURS
        for op in ops:
            mine = [r for r in rows if (r["provider"], style.op_of(r)) == (provider, op)]
            places = [place for row in mine if (place := point(row)) is not None]
            if places:
                axis.scatter(
                    *zip(*places, strict=True), s=46 if ours else 26, color=colour,
                    marker=_MARKERS[ops.index(op) % len(_MARKERS)], alpha=0.95 if ours else 0.75,
                    edgecolors="white", linewidths=0.5, zorder=4 if ours else 3,
                )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    ridge = 1e3 * peaks.tflops / peaks.gigabytes_per_s
    known = [place[0] for row in rows if (place := point(row)) is not None]
    low, high = min([*known, ridge / 30]) / 1.6, max([*known, 4 * ridge]) * 1.6
    intensities = [low, ridge, high]
    roof = [min(1e3 * peaks.tflops, peaks.gigabytes_per_s * each) for each in intensities]
    axis.plot(intensities, roof, color="black", linewidth=1.2, zorder=2)
    axis.set_xlim(low, high)
    axis.set_ylim(top=3 * max(roof[-1], axis.get_ylim()[1] / 2))
    axis.annotate(
        f"product by the library: {roof[-1]:,.0f} GFLOP/s", (ridge, roof[1]), (0, 6),
        fontsize=8, ha="center", textcoords="offset points",
    )  # fmt: skip
    middle = (low * ridge) ** 0.5
    axis.annotate(
        f"copy: {peaks.gigabytes_per_s:,.0f} GB/s", (middle, peaks.gigabytes_per_s * middle),
        (-8, 4), fontsize=8, ha="right", textcoords="offset points",
    )  # fmt: skip
    axis.set_xlabel("arithmetic intensity, FLOP a byte", fontsize=9)
    axis.grid(color="#e8e8e8", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, styles: dict[str, tuple[str, str]], ops: list[str]) -> None:
    from matplotlib.lines import Line2D

    def handle(name: str, colour: str, marker: str) -> Any:
        return Line2D(
            [], [], linestyle="", color=colour, marker=marker, markersize=7, label=name
        )  # fmt: skip

    handles = [handle(style.label(name), colour, "o") for name, (colour, _) in styles.items()]
    handles += [
        handle(op, "#404040", _MARKERS[index % len(_MARKERS)]) for index, op in enumerate(ops)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False,
        fontsize=9,
    )  # fmt: skip
