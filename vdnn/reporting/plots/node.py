"""Slowdown against the number of GPUs that share a link to the host, one line a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from vdnn.errors import UsageError
from vdnn.reporting.plots.bandwidth import Line
from vdnn.reporting.plots.canvas import legend_above, new_figure, styled
from vdnn.reporting.style import GREY, marker_look

__all__ = ["node_figure"]


@styled
def node_figure(panels: Sequence[tuple[str, Sequence[Line]]], columns: int = 3) -> Figure:
    """Panels of slowdowns against GPUs on a link; both axes are logarithmic, 1 is one GPU alone without offload.

    Raises:
        UsageError: no panels.
    """
    if not panels:
        raise UsageError("there are no lines to draw")
    names = list(dict.fromkeys(line.name for _, lines in panels for line in lines))
    looks = {name: marker_look(name, n) for n, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    figure = new_figure(0.5 + 2.2 * rows, 3.1 * columns)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_visible(False)
            continue
        title, lines = panels[number]
        _panel(axes, title, lines, looks)
        if number % columns == 0:
            axes.set_ylabel("slowdown")
        if number >= len(panels) - columns:
            axes.set_xlabel("GPUs on one link")
    handles: list[Any] = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=3.5, label=name)
        for name, look in looks.items()
    ]
    legend_above(figure, handles, columns=7)
    return figure


def _panel(axes: Any, title: str, lines: Sequence[Line], looks: dict[str, Any]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for line in lines:
        look = looks[line.name]
        x, y = zip(*line.points, strict=True)
        axes.plot(x, y, color=look.colour, marker=look.marker, markersize=3, linewidth=0.9)
    axes.set_xticks(sorted({x for line in lines for x, _ in line.points}))
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_title(title)
    axes.grid(axis="y")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())
