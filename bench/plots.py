"""The plots of docs/benchmarks.md, as SVG. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, STANDARD, FORKS = "#1662a8", "#2b2b2b", "#c4562b"
LIMIT = "#3a8a4d"
MARKERS = "osD^vPX*"
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "errand-boy",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Points = Sequence[tuple[float, float, float, float]]  # x, then first quartile, median, third


def cost(
    path: Path, xlabel: str, lines: Mapping[str, tuple[str, Points]], limit: float | None
) -> None:
    """Draw milliseconds against a caller's size; `lines` are colours and points by name."""
    with styled():
        figure, axes = new_figure(8.0, 4.6)
        used: dict[str, int] = {}
        for name, (colour, points) in lines.items():
            number = used[colour] = used.get(colour, -1) + 1
            x, first, median, third = zip(*points, strict=True)
            axes.fill_between(x, first, third, color=colour, alpha=0.12, linewidth=0)
            style = ("-", "--", ":", "-.")[number % 4]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(x, median, style, color=colour, marker=marker, markersize=4.5, label=name)
        if limit is not None:
            axes.axhline(limit, color=LIMIT, linewidth=1, label="C: vfork, exec, wait (small)")
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="start to reaped, ms")
        axes.set_xticks([x for x, *_ in next(iter(lines.values()))[1]])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(which="major", color="#dddddd", linewidth=0.6)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        save(figure, path)


def throughput(
    path: Path, bars: Sequence[tuple[str, str, float, float, float]], limit: float
) -> None:
    """Draw commands per second; a bar is a name, a colour and (first quartile, median, third)."""
    with styled():
        figure, axes = new_figure(8.0, 0.8 + 0.26 * len(bars))
        names, colours, first, median, third = zip(*bars, strict=True)
        below = [m - low for m, low in zip(median, first, strict=True)]
        above = [high - m for m, high in zip(median, third, strict=True)]
        axes.barh(names, median, color=colours, height=0.7)
        axes.errorbar(
            median, names, xerr=(below, above), fmt="none", ecolor="#888888", elinewidth=1
        )
        axes.axvline(limit, color=LIMIT, linewidth=1.5)
        axes.text(limit, -0.9, "C loops ", ha="right", va="bottom", color=LIMIT)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("commands per second (/bin/true, output captured)")
        axes.xaxis.set_major_formatter("{x:,g}")
        save(figure, path)


def styled() -> Any:
    return importlib.import_module("matplotlib").rc_context(SETTINGS)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    figure = importlib.import_module("matplotlib.figure").Figure((width, height))
    return figure, figure.subplots()


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})
