"""Peak memory and iteration time by policy: what each policy saves, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdnn.errors import UsageError
from vdnn.reporting.plots.canvas import area, box_of, legend_above, new_figure, patch, styled
from vdnn.reporting.rows import LEVELS, Comparison, Level, comparisons, peak_of
from vdnn.reporting.scale import NOTHING, byte_scale, time_scale
from vdnn.reporting.style import BLUE, CAPACITY, FIT_LOOK, NO_FIT_LOOK, STALL_LOOK, Look
from vdnn.units import format_bytes, format_ns
from vdnn.values import RunResult

__all__ = ["policies_figure"]

_BUSY = Look("computing", BLUE)
_BAR = 0.74


@styled
def policies_figure(
    results: Sequence[RunResult], capacity_bytes: int | None = None, baseline: RunResult | None = None
) -> Figure:
    """Bars by policy, grouped by model, batch, GPU and precision where these differ.

    Left the peak, on the first level of memory that all results know, with the capacity as a line; right the
    iteration time with the stalls in it, and the slowdown against the run without offload.

    Raises:
        UsageError: no results.
    """
    if not results:
        raise UsageError("there are no results to draw")
    pairs = comparisons(results, baseline)
    level = common_level(results)
    places, headings = _places(pairs)
    figure = new_figure(0.9 + 0.2 * (len(pairs) + len(headings)))
    left, right = figure.subplots(1, 2, sharey=True)
    _peaks(left, pairs, places, level, capacity_bytes)
    _times(right, pairs, places)
    rows = sorted(
        [(y, text, True) for y, text in headings]
        + [(y, pair.result.policy, False) for y, pair in zip(places, pairs, strict=True)]
    )
    left.set_yticks([y for y, _, _ in rows], [text for _, text, _ in rows])
    for label, (_, _, heading) in zip(left.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if heading else "normal")
    left.set_ylim(max(places) + 0.6, min(y for y, _, _ in rows) - 0.6)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    handles: list[Any] = [patch(FIT_LOOK, f"peak {level}" if level else "peak"), patch(_BUSY)]
    if any(pair.result.stall_ns for pair in pairs):
        handles.append(patch(STALL_LOOK, boxed=True))
    if any(pair.result.fits is False for pair in pairs):
        handles.append(patch(NO_FIT_LOOK))
    if capacity_bytes is not None:
        text = f"capacity {format_bytes(capacity_bytes)}"
        handles.append(Line2D([], [], color=CAPACITY, linestyle="--", linewidth=1.2, label=text))
    legend_above(figure, handles, columns=5)
    return figure


def common_level(results: Sequence[RunResult]) -> Level | None:
    """The first level of memory that every result knows, or else that any knows: levels are never mixed."""
    for quantifier in (all, any):
        for level in LEVELS:
            if quantifier(peak_of(r, level) is not None for r in results):
                return level
    return None


def _places(pairs: Sequence[Comparison]) -> tuple[list[float], list[tuple[float, str]]]:
    """The height of each bar, and of the heading of each group; no headings for one group."""
    results = [pair.result for pair in pairs]
    names = ("model", "batch", "gpu", "precision", "source")
    varying = [n for n in names if len({getattr(r, n) for r in results}) > 1]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, r in enumerate(results):
        groups.setdefault(tuple(getattr(r, n) for n in varying), []).append(i)
    places, headings, y = [0.0] * len(results), [], 0.0
    for key, members in groups.items():
        if varying:
            parts = [f"batch {v}" if n == "batch" else str(v) for n, v in zip(varying, key, strict=True)]
            headings.append((y, " · ".join(parts)))
            y += 1
        for i in members:
            places[i] = y
            y += 1
        y += 0.3
    return places, headings


def _peaks(
    axes: Any, pairs: Sequence[Comparison], places: Sequence[float], level: Level | None, capacity_bytes: int | None
) -> None:
    peaks = [peak_of(pair.result, level) if level is not None else None for pair in pairs]
    size = byte_scale([*peaks, capacity_bytes])
    for pair, y, peak in zip(pairs, places, peaks, strict=True):
        if peak is not None:
            look = NO_FIT_LOOK if pair.result.fits is False else FIT_LOOK
            axes.barh(y, size.of(peak), _BAR, **area(look))
        _beside(axes, size.of(peak or 0), y, size.text(peak))
    if capacity_bytes is not None:
        axes.axvline(size.of(capacity_bytes), color=CAPACITY, linestyle="--", linewidth=1.2)
    largest = max([size.of(peak) for peak in peaks if peak is not None] + [size.of(capacity_bytes or 0)])
    axes.set_xlim(0, 1.16 * (largest or 1))
    axes.set_xlabel(f"peak {level or 'memory'} [{size.unit}]" if not level else f"peak memory, {level} [{size.unit}]")


def _times(axes: Any, pairs: Sequence[Comparison], places: Sequence[float]) -> None:
    times = [pair.result.iteration_time_ns for pair in pairs]
    time = time_scale(times)
    for pair, y, whole in zip(pairs, places, times, strict=True):
        if whole is None:
            _beside(axes, 0, y, NOTHING)
            continue
        stall = min(pair.result.stall_ns or 0, whole)
        axes.barh(y, time.of(whole - stall), _BAR, **area(NO_FIT_LOOK if pair.result.fits is False else _BUSY))
        if stall:
            axes.barh(y, time.of(stall), _BAR, left=time.of(whole - stall), **box_of(STALL_LOOK))
        text = format_ns(whole) if pair.slowdown is None or pair.is_baseline else f"{pair.slowdown:.2f}×"
        _beside(axes, time.of(whole), y, text)
    largest = max((time.of(t) for t in times if t is not None), default=1)
    axes.set_xlim(0, 1.24 * (largest or 1))
    axes.set_xlabel(f"iteration time [{time.unit}], and slowdown")


def _beside(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )
