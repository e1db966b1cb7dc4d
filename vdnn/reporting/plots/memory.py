"""Memory over one iteration, stacked by category, without and with offload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdnn.errors import UsageError
from vdnn.reporting.levels import Levels, memory_levels, thinned
from vdnn.reporting.plots.canvas import area, legend_above, new_figure, patch, styled
from vdnn.reporting.scale import Scale, byte_scale, time_scale
from vdnn.reporting.style import CAPACITY, CATEGORY_LOOKS, category_look
from vdnn.units import format_bytes, format_ns
from vdnn.values import RunResult, Timeline

__all__ = ["end_of", "memory_figure", "phase_ends"]

# A capacity far above the peak would squeeze the curves: beyond this ratio it is told, not drawn.
_CAPACITY_IN_VIEW = 1.6


def end_of(timeline: Timeline) -> int:
    """The last moment that a timeline knows."""
    ends = [span.end_ns for span in timeline.spans] + [event.time_ns for event in timeline.memory[-1:]]
    return max(ends, default=0)


def phase_ends(result: RunResult) -> list[tuple[str, int]]:
    """When each phase of the step ends on the device, in order: from the compute spans, else from the times."""
    assert result.timeline is not None
    ends: dict[str, int] = {}
    for span in result.timeline.spans:
        if span.stream == "compute" and span.phase in ("forward", "backward", "optimizer"):
            ends[span.phase] = max(span.end_ns, ends.get(span.phase, 0))
    if not ends and result.forward_time_ns is not None:
        ends["forward"] = result.forward_time_ns
        ends["backward"] = result.forward_time_ns + (result.backward_time_ns or 0)
        if not result.backward_time_ns:
            ends["backward"] = max(end_of(result.timeline), result.forward_time_ns)
    return sorted(ends.items(), key=lambda pair: pair[1])


@styled
def memory_figure(result: RunResult, baseline: RunResult | None = None, capacity_bytes: int | None = None) -> Figure:
    """Memory of a run over time, below that of the run without offload when it is given; axes are shared.

    Raises:
        UsageError: a result without memory events.
    """
    runs = [run for run in (baseline, result) if run is not None]
    found = [_levels_of(run) for run in runs]
    peak = max(int(levels.total.max()) for levels in found)
    last = max(end_of(run.timeline) for run in runs if run.timeline is not None)
    size, time = byte_scale([peak]), time_scale([last])
    in_view = capacity_bytes is not None and capacity_bytes <= _CAPACITY_IN_VIEW * peak
    figure = new_figure(0.5 + 2.3 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, run, levels in zip(panels, runs, found, strict=True):
        _stack(axes, levels, max(last if len(runs) == 1 else 0, _end(run)), size, time)
        _phases(axes, run, time, last)
        told = "" if capacity_bytes is None or in_view else f" · capacity {format_bytes(capacity_bytes)}, out of view"
        peak_text = f"peak {format_bytes(int(levels.total.max()))} · {format_ns(_end(run))}"
        axes.set_title(f"{run.policy}: {peak_text}{told}", loc="left", pad=15, fontweight="bold")
        axes.set_ylabel(f"memory [{size.unit}]")
        if in_view and capacity_bytes is not None:
            axes.axhline(size.of(capacity_bytes), color=CAPACITY, linestyle="--", linewidth=1.2)
    highest = max(peak, capacity_bytes or 0) if in_view else peak
    panels[0].set_ylim(0, 1.06 * size.of(highest))
    panels[0].set_xlim(0, time.of(last))
    panels[-1].set_xlabel(f"time in the iteration [{time.unit}]")
    legend_above(figure, _handles(found, capacity_bytes if in_view else None))
    return figure


def _levels_of(run: RunResult) -> Levels:
    if run.timeline is None or not (run.timeline.memory or run.timeline.resident):
        raise UsageError(
            f"the result of {run.model!r} under {run.policy!r} has no memory events: run it with a timeline"
        )
    return memory_levels(run.timeline)


def _end(run: RunResult) -> int:
    assert run.timeline is not None
    return end_of(run.timeline)


def _stack(axes: Any, levels: Levels, end_ns: int, size: Scale, time: Scale) -> None:
    shown = thinned(levels)
    times = np.append(shown.times_ns, max(end_ns, int(shown.times_ns[-1]))) / time.divisor
    bottom = np.zeros(len(times))
    for category, nbytes in zip(shown.categories, shown.nbytes, strict=True):
        top = bottom + np.append(nbytes, nbytes[-1]) / size.divisor
        if nbytes.any():
            axes.fill_between(times, bottom, top, step="post", label=category, **area(category_look(category)))
        bottom = top
    axes.step(times, bottom, where="post", color="black", linewidth=0.6)
    at = levels.peak_index
    axes.plot(
        [levels.times_ns[at] / time.divisor],
        [levels.total[at] / size.divisor],
        marker="v",
        color="black",
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        clip_on=False,
        label="peak",
    )
    axes.grid(axis="y")


def _phases(axes: Any, run: RunResult, time: Scale, last_ns: int) -> None:
    """A line where each phase ends, and its name in the strip above the axes."""
    begin = 0
    for name, end in phase_ends(run):
        axes.axvline(time.of(end), color="#444444", linestyle=":", linewidth=0.9)
        if end - begin > 0.08 * last_ns:
            middle = time.of(begin + end) / 2
            axes.annotate(
                name,
                (middle, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color="#444444",
            )
        begin = end


def _handles(found: Sequence[Levels], capacity_bytes: int | None) -> list[Any]:
    drawn = [c for levels in found for c, row in zip(levels.categories, levels.nbytes, strict=True) if row.any()]
    order = [*(c for c in CATEGORY_LOOKS if c in drawn), *sorted(set(drawn) - set(CATEGORY_LOOKS))]
    handles: list[Any] = [patch(category_look(c)) for c in order]
    handles.append(Line2D([], [], color="black", marker="v", linestyle="none", markersize=5, label="peak"))
    if capacity_bytes is not None:
        text = f"capacity {format_bytes(capacity_bytes)}"
        handles.append(Line2D([], [], color=CAPACITY, linestyle="--", linewidth=1.2, label=text))
    return handles
