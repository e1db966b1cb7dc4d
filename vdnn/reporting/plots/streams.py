"""The streams of a run as a Gantt chart: what ran when on host, compute, offload and prefetch, and who waited."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import box_of, legend_above, new_figure, patch, styled
from vdnn.reporting.plots.memory import end_of, phase_ends
from vdnn.reporting.scale import Scale, time_scale
from vdnn.reporting.style import CAUSE_LOOKS, GREY, PHASE_LOOKS, STREAM_LOOKS, Look
from vdnn.values import RunResult, Timeline

__all__ = ["streams_figure"]

_HALF = 0.36
_INCHES_WIDE = 5.6


@styled
def streams_figure(result: RunResult, zoom_ns: tuple[int, int] | None = None) -> Figure:
    """The whole iteration, and below it the stretch `zoom_ns` with the names of what ran.

    At the right of each row: how much of the shown time the stream was busy.

    Raises:
        UsageError: a result without spans, or a stretch that is empty or outside of the iteration.
    """
    timeline = result.timeline
    if timeline is None or not timeline.spans:
        raise UsageError(f"the result of {result.model!r} under {result.policy!r} has no spans: run it with a timeline")
    last = end_of(timeline)
    ranges = [(0, last)]
    if zoom_ns is not None:
        if not 0 <= zoom_ns[0] < zoom_ns[1] or zoom_ns[0] >= last:
            raise UsageError(f"cannot show {zoom_ns[0]} … {zoom_ns[1]} ns of an iteration of {last} ns")
        ranges.append((zoom_ns[0], min(zoom_ns[1], last)))
    figure = new_figure(0.7 + 1.75 * len(ranges))
    panels = figure.subplots(len(ranges), 1, squeeze=False)[:, 0]
    for axes, (begin, end) in zip(panels, ranges, strict=True):
        time = time_scale([last])
        _rows(axes, timeline, begin, end, time)
        for _, moment in phase_ends(result):
            axes.axvline(time.of(moment), color="#444444", linestyle=":", linewidth=0.9)
        axes.set_xlim(time.of(begin), time.of(end))
    if zoom_ns is not None:
        begin, end = ranges[1]
        _frame(panels[0], time_scale([last]), begin, end, len(timeline.streams))
        _names(panels[1], timeline, begin, end, time_scale([last]))
    panels[-1].set_xlabel(f"time in the iteration [{time_scale([last]).unit}]")
    legend_above(figure, _handles(timeline), columns=5)
    return figure


def _look(stream: str, phase: str) -> Look:
    return STREAM_LOOKS.get(stream) or PHASE_LOOKS.get(phase) or Look("other", GREY)


def _rows(axes: Any, timeline: Timeline, begin: int, end: int, time: Scale) -> None:
    streams = timeline.streams
    busy = dict.fromkeys(streams, 0)
    bars: dict[tuple[str, Look], list[tuple[float, float]]] = {}
    for span in timeline.spans:
        if span.end_ns > begin and span.start_ns < end:
            look = _look(span.stream, span.phase)
            bars.setdefault((span.stream, look), []).append(
                (time.of(span.start_ns), time.of(span.end_ns - span.start_ns))
            )
            busy[span.stream] += min(span.end_ns, end) - max(span.start_ns, begin)
    waits: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for stall in timeline.stalls:
        if stall.end_ns > begin and stall.start_ns < end:
            group = waits.setdefault((stall.stream, stall.cause), [])
            group.append((time.of(stall.start_ns), time.of(stall.end_ns - stall.start_ns)))
    for (stream, cause), extents in waits.items():
        box = box_of(CAUSE_LOOKS[cause])
        if len(extents) > 100:
            # Outlines of that many boxes would fill the row; the hatches alone leave its density to see.
            box["linewidth"] = 0
        axes.broken_barh(extents, (streams.index(stream) - _HALF, 2 * _HALF), label=cause, **box)
    for (stream, look), extents in bars.items():
        wide: list[tuple[float, float]] = []
        narrow: list[tuple[float, float]] = []
        for extent in extents:
            (wide if extent[1] * 72 * _INCHES_WIDE > 3 * time.of(end - begin) else narrow).append(extent)
        place = (streams.index(stream) - _HALF, 2 * _HALF)
        if wide:
            axes.broken_barh(wide, place, facecolor=look.colour, edgecolor="white", linewidth=0.4, label=look.label)
        if narrow:
            # A few short spans get a hairline so as to be seen; many would fill the row with their edges.
            hairline = 0.3 if len(narrow) < 200 else 0
            axes.broken_barh(
                narrow, place, facecolor=look.colour, edgecolor=look.colour, linewidth=hairline, label=look.label
            )
    axes.set_yticks(range(len(streams)), streams)
    axes.set_ylim(len(streams) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for i, stream in enumerate(streams):
        text = f"{100 * busy[stream] / max(1, end - begin):.0f} % busy"
        axes.annotate(
            text,
            (1.0, i),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color="#444444",
            annotation_clip=False,
        )


def _frame(axes: Any, time: Scale, begin: int, end: int, rows: int) -> None:
    axes.add_patch(
        Rectangle(
            (time.of(begin), -0.47),
            time.of(end - begin),
            rows - 0.06,
            facecolor="none",
            edgecolor="black",
            linewidth=1.0,
            zorder=5,
        )
    )


def _names(axes: Any, timeline: Timeline, begin: int, end: int, time: Scale) -> None:
    """Names of spans, in those that are wide enough to hold them."""
    points_a_letter = 3.6
    for span in timeline.spans:
        left, right = max(span.start_ns, begin), min(span.end_ns, end)
        width = 72 * _INCHES_WIDE * (right - left) / (end - begin)
        if width > points_a_letter * (len(span.what) + 2):
            axes.text(
                time.of(left + right) / 2,
                timeline.streams.index(span.stream),
                span.what,
                ha="center",
                va="center",
                fontsize=6,
                color="white" if _look(span.stream, span.phase) is PHASE_LOOKS["forward"] else "black",
                clip_on=True,
            )


def _handles(timeline: Timeline) -> list[Any]:
    looks = {_look(span.stream, span.phase): None for span in timeline.spans}
    order = [*PHASE_LOOKS.values(), *STREAM_LOOKS.values()]
    order += [look for look in looks if look not in order]
    handles = [patch(look) for look in order if look in looks]
    causes = {stall.cause for stall in timeline.stalls}
    return handles + [patch(look, boxed=True) for cause, look in CAUSE_LOOKS.items() if cause in causes]
