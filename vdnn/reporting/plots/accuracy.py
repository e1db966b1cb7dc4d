"""Predicted against measured times of many steps, and errors by family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import legend_above, new_figure, styled
from vdnn.reporting.style import BAND, GREY, marker_look

__all__ = ["accuracy_figure", "families_figure"]


@styled
def accuracy_figure(groups: Mapping[str, Sequence[tuple[float, float]]], band: float = 0.15) -> Figure:
    """One point a step, (measured, predicted) in ms on logarithmic axes; the grey band is ±`band` of the measurement.

    Raises:
        UsageError: there are no points.
    """
    if not any(groups.values()):
        raise UsageError("there are no predictions beside measurements to draw")
    figure = new_figure(4.6, 4.6)
    axes = figure.subplots()
    every = np.array([point for points in groups.values() for point in points])
    ends = np.array([every.min() / 1.3, every.max() * 1.3])
    axes.fill_between(ends, ends * (1 - band), ends * (1 + band), color=BAND, linewidth=0, label=f"±{100 * band:g} %")
    axes.plot(ends, ends, color="black", linewidth=0.8, label="equal")
    for number, (name, points) in enumerate(groups.items()):
        if points:
            look = marker_look(name, number)
            x, y = np.array(points).T
            axes.plot(x, y, linestyle="none", marker=look.marker, markersize=2.6, color=look.colour, label=name)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("measured [ms]")
    axes.set_ylabel("predicted [ms]")
    legend_above(figure, axes.get_legend_handles_labels()[0], columns=1)
    return figure


@styled
def families_figure(families: Mapping[str, Sequence[float]]) -> Figure:
    """Errors in per cent by family of models: a dot a step, a bar at the median; families by their medians.

    Raises:
        UsageError: there are no families.
    """
    if not families:
        raise UsageError("there are no families to draw")
    names = sorted(families, key=lambda name: float(np.median(families[name])))
    figure = new_figure(3.4, 9.5)
    axes = figure.subplots()
    for place, name in enumerate(names):
        errors = 100 * np.array(families[name])
        axes.plot([place] * len(errors), errors, linestyle="none", marker=".", markersize=3, color=GREY)
        axes.plot([place - 0.4, place + 0.4], [np.median(errors)] * 2, color="black", linewidth=1.4)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_xlim(-1, len(names))
    axes.set_ylabel("predicted − measured [%]")
    return figure
