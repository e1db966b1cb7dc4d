"""Slowdown against the bandwidth of the link: where offload becomes free, one line a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import legend_above, new_figure, styled
from vdnn.reporting.style import GREY, marker_look

__all__ = ["LINKS", "Line", "bandwidth_figure"]

# Each way, in GB/s, as memcpy reaches it: what the presets of GPUs with such a link have.
LINKS = (("PCIe 3", 12.8), ("PCIe 4", 25.0), ("PCIe 5", 50.0), ("C2C", 350.0))


@dataclass(frozen=True, slots=True)
class Line:
    """One network on one machine: (GB/s each way, slowdown) points in order."""

    name: str
    points: tuple[tuple[float, float], ...]


@styled
def bandwidth_figure(panels: Sequence[tuple[str, Sequence[Line]]], columns: int = 3) -> Figure:
    """Panels, one a machine, of slowdowns against the link's bandwidth; both axes are logarithmic.

    Raises:
        UsageError: no panels.
    """
    if not panels:
        raise UsageError("there are no lines to draw")
    names = list(dict.fromkeys(line.name for _, lines in panels for line in lines))
    looks: dict[str, Any] = {
        name: (marker_look(name, n), "-" if n < 7 else "--") for n, name in enumerate(names)
    }  # 7 colours
    rows = -(-len(panels) // columns)
    figure = new_figure(0.5 + 2.2 * rows, 3.1 * columns)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_visible(False)
            continue
        _panel(axes, *panels[number], looks)
        if number % columns == 0:
            axes.set_ylabel("slowdown")
        if number >= len(panels) - columns:
            axes.set_xlabel("link, each way [GB/s]")
    handles: list[Any] = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=3.5, linestyle=style, label=name)
        for name, (look, style) in looks.items()
    ]
    legend_above(figure, handles, columns=5)
    return figure


def _panel(axes: Any, title: str, lines: Sequence[Line], looks: dict[str, Any]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in lines:
        look, style = looks[line.name]
        x, y = zip(*line.points, strict=True)
        axes.plot(x, y, color=look.colour, marker=look.marker, markersize=2.5, linewidth=0.9, linestyle=style)
    axes.axhline(1.05, color=GREY, linewidth=0.8, linestyle="--")
    for name, rate in LINKS:
        axes.axvline(rate, color=GREY, linewidth=0.6, linestyle=":")
        axes.annotate(
            name, (rate, 0.99), xycoords=("data", "axes fraction"), rotation=90, fontsize=5.5, ha="right", va="top"
        )
    axes.set_title(title)
    axes.grid(axis="y")
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())
