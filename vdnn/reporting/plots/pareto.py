"""Peak memory against slowdown: plans for budgets, the policies, and the bound below which nothing lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import legend_above, new_figure, styled
from vdnn.reporting.style import BLACK, BLUE, ORANGE, PALE, VERMILION, marker_look

__all__ = ["advice_figure", "growth_figure", "pareto_figure"]

_GIB = 2**30
_MOST = 3.0  # slowdowns beyond that are drawn at the edge


@styled
def pareto_figure(panels: Sequence[tuple[str, Mapping[str, Any]]], columns: int = 3) -> Figure:
    """A panel a model and GPU, from the numbers of an experiment's frontier.

    Raises:
        UsageError: no panels.
    """
    if not panels:
        raise UsageError("there are no plans to draw")
    names = sorted({name for _, numbers in panels for name in numbers["policies"]})
    looks = {name: marker_look(name, n) for n, name in enumerate(names)}
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(0.6 + 2.4 * rows, 3.3 * columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        title, numbers = panels[place]
        base = numbers["time_ns"]
        budgets = sorted(numbers["budgets"].values(), key=lambda b: b["budget_bytes"])
        memory = [b["budget_bytes"] / _GIB for b in budgets] + [numbers["baseline_bytes"] / _GIB]
        bound = [b["bound_ns"] / base for b in budgets] + [1.0]
        plans = [b["time_ns"] / base for b in budgets] + [1.0]
        axes.fill_between(memory, 0, bound, color=PALE, linewidth=0)
        axes.plot(memory, plans, color=BLACK, marker=".", linewidth=1.2)
        for name, policy in numbers["policies"].items():
            look = looks[name]
            axes.plot(
                policy["least_bytes"] / _GIB,
                min(policy["time_ns"] / base, _MOST),
                look.marker,
                color=look.colour,
                markersize=3.5,
                linestyle="none",
            )
        axes.set_ylim(0.95, _MOST * 1.02)
        axes.set_title(title)
        if place >= len(panels) - columns:
            axes.set_xlabel("memory, GiB")
        if place % columns == 0:
            axes.set_ylabel("slowdown")
    handles: list[Any] = [
        Line2D([], [], color=BLACK, marker=".", label="plans for budgets"),
        Patch(color=PALE, label="below the bound"),
    ]
    handles += [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=3.5, linestyle="none", label=name)
        for name, look in looks.items()
    ]
    legend_above(figure, handles, columns=5)
    return figure


@styled
def growth_figure(points: Sequence[tuple[int, float]]) -> Figure:
    """CPU seconds of a plan against the ops of its step; both axes are logarithmic."""
    figure = new_figure(2.6, 4.2)
    axes = figure.subplots()
    axes.loglog([ops for ops, _ in points], [max(seconds, 0.01) for _, seconds in points], "k.", markersize=3)
    if points:
        most = max(ops for ops, _ in points)
        axes.set_xlim(min(ops for ops, _ in points) / 1.3, 10 ** math.ceil(math.log10(most)))
    axes.set_xlabel("ops in the step")
    axes.set_ylabel("CPU seconds")
    return figure


@styled
def advice_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A bar a GPU: the step with unlimited memory, and what fitting adds; GPUs on which nothing fits are named.

    Raises:
        UsageError: no GPUs.
    """
    if not rows:
        raise UsageError("there are no GPUs to draw")
    figure = new_figure(0.9 + 0.2 * len(rows), 5.2)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        free = row["free_time_ns"] / 1e6
        if row["time_ns"] is None:
            short = f" needs {row['needs_bytes'] / _GIB:.1f} of {row['available_bytes'] / _GIB:.1f} GiB"
            axes.text(0, place, short, va="center", fontsize=7, color=VERMILION)
            continue
        axes.barh(place, min(free, row["time_ns"] / 1e6), color=BLUE, height=0.7)
        axes.barh(place, max(0.0, row["time_ns"] / 1e6 - free), left=free, color=ORANGE, height=0.7)
        axes.text(row["time_ns"] / 1e6, place, f" {row['how']}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [row["gpu"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("step, ms")
    axes.set_title(title)
    handles: list[Any] = [Patch(color=BLUE, label="with unlimited memory"), Patch(color=ORANGE, label="to fit")]
    legend_above(figure, handles, columns=2)
    return figure
