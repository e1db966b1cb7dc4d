"""Simulated bars beside those of a paper: what differs is printed over each pair.

pairs_figure    panels of bars, ours filled and the paper's outlined beside it
stacked_figure  the same for bars that are made of parts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import area, legend_above, new_figure, patch, styled
from vdnn.reporting.style import BLUE, GREY, ORANGE, SKY, VERMILION, YELLOW, Look

__all__ = ["Bars", "Panel", "Stack", "pairs_figure", "stacked_figure"]

_OURS = Look("simulated", BLUE)
_SECOND = Look("average, simulated", SKY)
_PARTS = (Look("", BLUE), Look("", SKY, "////"), Look("", YELLOW, "...."), Look("", ORANGE, "\\\\\\\\"))
_HALF = 0.4


@dataclass(frozen=True, slots=True)
class Bars:
    """One position: ours and the paper's (None: the paper has none), the difference in words, and a second pair
    drawn inside the first, such as an average inside a maximum."""

    label: str
    ours: float
    paper: float | None
    difference: str = ""
    second: float | None = None
    paper_second: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes."""

    title: str
    bars: tuple[Bars, ...]


@styled
def pairs_figure(
    panels: Sequence[Panel], ylabel: str, columns: int, width: float, height: float, second: bool = False
) -> Figure:
    """Panels of pairs of bars, `columns` beside each other; sizes in inches.

    Raises:
        UsageError: no panels.
    """
    if not panels:
        raise UsageError("there are no panels to draw")
    rows = -(-len(panels) // columns)
    figure = new_figure(height * rows, width)
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_visible(False)
            continue
        _panel(axes, panels[number])
        if number % columns == 0:
            axes.set_ylabel(ylabel)
    handles: list[Any] = [patch(_OURS, "maximum, simulated" if second else "")]
    if second:
        handles.append(patch(_SECOND))
    handles.append(Patch(facecolor="white", edgecolor=VERMILION, linewidth=1.2, label="the paper's bar"))
    handles.append(Patch(facecolor="none", edgecolor="none", label="no red bar: not shown in the paper"))
    legend_above(figure, handles, columns=4)
    return figure


def _panel(axes: Any, panel: Panel) -> None:
    top = max([max(b.ours, b.paper or 0) for b in panel.bars], default=1) or 1
    for x, b in enumerate(panel.bars):
        alone = b.paper is None
        place, wide = (x, 2 * _HALF) if alone else (x - _HALF / 2, _HALF)
        axes.bar(place, b.ours, wide * 0.94, **area(_OURS))
        if b.second is not None:
            axes.bar(place, b.second, wide * 0.5, **area(_SECOND))
        if b.paper is not None:
            outline = {"facecolor": "none", "edgecolor": VERMILION, "linewidth": 1.1}
            axes.bar(x + _HALF / 2, b.paper, _HALF * 0.9, **outline)
            if b.paper_second is not None:
                axes.bar(x + _HALF / 2, b.paper_second, _HALF * 0.5, **outline)
            high = max(b.ours, b.paper)
            axes.text(x, high + 0.02 * top, b.difference, rotation=90, ha="center", va="bottom", fontsize=5.5)
    axes.set_xticks(range(len(panel.bars)), [b.label for b in panel.bars], rotation=90, fontsize=6.5)
    axes.set_ylim(0, 1.28 * top)
    axes.set_xlim(-0.6, len(panel.bars) - 0.4)
    axes.set_title(panel.title)
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)


@dataclass(frozen=True, slots=True)
class Stack:
    """One position: parts of ours and of the paper's bar (None: the paper has none), the difference in words.

    What there are more of than parts is a mark across the bar.
    """

    label: str
    ours: Sequence[float]
    paper: Sequence[float] | None
    difference: str


@styled
def stacked_figure(parts: Sequence[str], panels: Sequence[Sequence[Stack]], ylabel: str, mark: str = "") -> Figure:
    """Panels of stacked bars with the paper's beside.

    Raises:
        UsageError: no bars.
    """
    if not panels:
        raise UsageError("there are no bars to draw")
    figure = new_figure(3.4, 4.6 + 3.4 * (len(panels) - 1))
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=[len(p) for p in panels])[0]
    marked = False
    for axes, panel in zip(grid, panels, strict=True):
        top = max(max(sum(v[: len(parts)]), *v) for s in panel for v in (s.ours, s.paper) if v is not None)
        for x, stack in enumerate(panel):
            bars = [(stack.ours, x if stack.paper is None else x - _HALF / 2, False)]
            if stack.paper is not None:
                bars.append((stack.paper, x + _HALF / 2, True))
                high = max(max(sum(v[: len(parts)]), *v) for v, _, _ in bars)
                axes.text(x, high + 0.015 * top, stack.difference, ha="center", va="bottom", fontsize=6)
            for values, place, framed in bars:
                _stack(axes, place, values[: len(parts)], _HALF * 0.92, framed)
                for extra in values[len(parts) :]:
                    marked = True
                    colour = VERMILION if framed else "black"
                    axes.hlines(extra, place - _HALF / 2, place + _HALF / 2, color=colour, linewidth=1.4)
        axes.set_xticks(range(len(panel)), [stack.label for stack in panel], rotation=40, ha="right")
        axes.set_ylim(0, 1.15 * top)
        axes.set_xlim(-0.6, len(panel) - 0.4)
        axes.grid(axis="y")
    grid[0].set_ylabel(ylabel)
    handles: list[Any] = [Patch(label=name, **area(look)) for name, look in zip(parts, _PARTS, strict=False)]
    handles.append(Patch(facecolor=GREY, edgecolor=VERMILION, linewidth=1.2, label="red: the paper's"))
    if marked:
        handles.append(Line2D([], [], color="black", linewidth=1.4, label=mark))
    legend_above(figure, handles, columns=6)
    return figure


def _stack(axes: Any, x: float, values: Sequence[float], width: float, framed: bool) -> None:
    bottom = 0.0
    for value, look in zip(values, _PARTS, strict=False):
        axes.bar(x, value, width, bottom=bottom, **area(look))
        bottom += value
    if framed:
        axes.bar(x, bottom, width, facecolor="none", edgecolor=VERMILION, linewidth=1.2)
