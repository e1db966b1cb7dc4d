"""Prediction beside measurement: points on the diagonal are right, the band says how near the others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import area, legend_above, new_figure, styled
from vdnn.reporting.plots.policies import common_level
from vdnn.reporting.rows import Level, peak_of
from vdnn.reporting.scale import Scale, byte_scale, time_scale
from vdnn.reporting.style import BAND, Look, marker_look
from vdnn.values import RunResult

__all__ = ["prediction_figure"]

Pair = tuple[RunResult, RunResult]


@styled
def prediction_figure(pairs: Sequence[Pair], band: float = 0.05) -> Figure:
    """Peak memory and iteration time, predicted against measured, one point a (predicted, measured) pair.

    The grey band is ±`band` of the measurement. What one of a pair does not know is left out and counted; a
    quantity that no pair knows has no axes.

    Raises:
        UsageError: no pairs, or a band that is not between 0 and 1.
    """
    if not pairs:
        raise UsageError("there are no pairs of a prediction and a measurement to draw")
    if not 0 < band < 1:
        raise UsageError(f"band is {band}: it must be between 0 and 1")
    level = common_level([run for pair in pairs for run in pair])
    policies = list(dict.fromkeys(predicted.policy for predicted, _ in pairs))
    looks = {policy: marker_look(policy, i) for i, policy in enumerate(policies)}
    peaks = [(_peak(p, level), _peak(m, level)) for p, m in pairs]
    times = [(p.iteration_time_ns, m.iteration_time_ns) for p, m in pairs]
    names = [predicted.policy for predicted, _ in pairs]
    shown = []
    if any(predicted and measured for predicted, measured in peaks) or not any(p and m for p, m in times):
        shown.append((peaks, byte_scale(_smallest(peaks)), f"peak {level or 'memory'}"))
    if any(predicted and measured for predicted, measured in times):
        shown.append((times, time_scale(_smallest(times)), "iteration time"))
    figure = new_figure(3.9) if len(shown) == 2 else new_figure(4.4, 4.4)
    for axes, (points, scale, what) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _scatter(axes, points, names, looks, scale, band, what)
    handles: list[Any] = [
        Line2D([], [], linestyle="none", marker=look.marker, color=look.colour, label=look.label, markersize=5)
        for look in looks.values()
    ]
    handles.append(Line2D([], [], color="black", linewidth=0.8, label="equal"))
    handles.append(Line2D([], [], color=BAND, linewidth=7, label=f"±{100 * band:g} %"))
    legend_above(figure, handles, columns=6 if len(shown) == 2 else 3)
    return figure


def _peak(run: RunResult, level: Level | None) -> int | None:
    return None if level is None else peak_of(run, level)


def _smallest(points: Sequence[tuple[int | None, int | None]]) -> list[int]:
    """The smallest known number: the unit of an axis that spans decades must suit it too."""
    known = [number for point in points for number in point if number]
    return [int(np.sqrt(float(min(known)) * float(max(known))))] if known else []


def _scatter(
    axes: Any,
    points: Sequence[tuple[int | None, int | None]],
    names: Sequence[str],
    looks: dict[str, Look],
    scale: Scale,
    band: float,
    what: str,
) -> None:
    known = [
        (scale.of(measured), scale.of(predicted), name)
        for (predicted, measured), name in zip(points, names, strict=True)
        if predicted and measured
    ]
    missing = len(points) - len(known)
    within = sum(abs(predicted - measured) <= band * measured for measured, predicted, _ in known)
    counted = f"{within} of {len(known)} within ±{100 * band:g} %"
    axes.set_title(counted + (f", {missing} not known" if missing else ""), loc="left")
    axes.set_xlabel(f"measured {what} [{scale.unit}]")
    axes.set_ylabel(f"predicted {what} [{scale.unit}]")
    if not known:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    numbers = [number for measured, predicted, _ in known for number in (measured, predicted)]
    # Over a narrow range a logarithmic axis would have one tick or none.
    decades = max(numbers) >= 5 * min(numbers)
    margin = 0.08 * max(numbers)
    low, high = (0.8 * min(numbers), 1.25 * max(numbers)) if decades else (min(numbers) - margin, max(numbers) + margin)
    line = np.array([low, high])
    axes.fill_between(line, (1 - band) * line, (1 + band) * line, zorder=1, **area(Look("", BAND)))
    axes.plot(line, line, color="black", linewidth=0.8, zorder=2)
    for policy, look in looks.items():
        mine = [(measured, predicted) for measured, predicted, name in known if name == policy]
        if mine:
            axes.plot(
                [m for m, _ in mine],
                [p for _, p in mine],
                linestyle="none",
                marker=look.marker,
                color=look.colour,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.4,
                label=policy,
                zorder=3,
            )
    for axis, set_scale, set_limits in (
        (axes.xaxis, axes.set_xscale, axes.set_xlim),
        (axes.yaxis, axes.set_yscale, axes.set_ylim),
    ):
        if decades:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(6))
        set_limits(low, high)
    axes.set_aspect("equal")
    axes.grid(True)
