"""Prediction beside measurement, as tables: one run in every quantity, or many runs in a line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vdnn.reporting.rows import differences, peak_of
from vdnn.reporting.scale import NOTHING, byte_scale, time_scale
from vdnn.reporting.sheet import Column, Sheet
from vdnn.units import format_bytes, format_ns
from vdnn.values import RunResult

__all__ = ["prediction_table", "predictions_table"]


def _percent(number: float | None) -> str:
    return NOTHING if number is None else f"{number:{'+' if round(number, 1) else ''}.1f}"


def prediction_table(predicted: RunResult, measured: RunResult, explanations: Mapping[str, str] | None = None) -> Sheet:
    """Every quantity of one run: predicted, measured, the difference in bytes or time and in per cent, explained."""
    rows = []
    for d in differences(predicted, measured, explanations):
        shown = format_ns if d.quantity.endswith("_ns") else format_bytes
        change = shown(d.difference)
        if d.difference is not None and d.difference > 0:
            change = "+" + change
        rows.append((d.label, shown(d.predicted), shown(d.measured), change, _percent(d.percent), d.explanation))
    columns = (
        Column("quantity", words=True),
        Column("predicted"),
        Column("measured"),
        Column("difference"),
        Column("[%]"),
        Column("explanation", words=True),
    )
    machine = predicted.gpu if predicted.gpu == measured.gpu else f"predicted {predicted.gpu}, measured {measured.gpu}"
    title = f"{predicted.model} · batch {predicted.batch} · {predicted.precision} · {machine} · {predicted.policy}"
    return Sheet(title, columns, tuple(rows), tuple(dict.fromkeys((*predicted.notes, *measured.notes))))


def predictions_table(pairs: Sequence[tuple[RunResult, RunResult]]) -> Sheet:
    """Runs in a line each: peak requested memory and time, predicted and measured, what was moved, equal tensors."""
    results = [r for pair in pairs for r in pair]
    size = byte_scale(peak_of(r, "requested") for r in results)
    moved = byte_scale(r.offloaded_bytes for r in results)
    clock = time_scale(r.iteration_time_ns for r in results)
    timed = any(p.iteration_time_ns and m.iteration_time_ns for p, m in pairs)
    rows = []
    for predicted, measured in pairs:
        found = {d.quantity: d for d in differences(predicted, measured)}
        time = found.get("iteration_time_ns")
        times = (
            (clock.text(time.predicted), clock.text(time.measured), _percent(time.percent)) if time else (NOTHING,) * 3
        )
        peak = found["peak_requested_bytes"]
        rows.append(
            (
                measured.model,
                measured.policy,
                size.text(peak.predicted),
                size.text(peak.measured),
                format_bytes(peak.difference) if peak.difference is not None else NOTHING,
                _percent(peak.percent),
                *(times if timed else ()),
                moved.text(predicted.offloaded_bytes),
                moved.text(measured.offloaded_bytes),
                {True: "yes", False: "NO", None: NOTHING}[measured.exact],
                peak.explanation,
            )
        )
    columns = (
        Column("model", words=True),
        Column("policy", words=True),
        Column(f"peak\npredicted\n[{size.unit}]"),
        Column(f"peak\nmeasured\n[{size.unit}]"),
        Column("difference\n\n"),
        Column("\n\n[%]"),
        *(Column(f"time\n{what}\n[{clock.unit}]") for what in ("predicted", "measured") if timed),
        *([Column("\n\n[%]")] if timed else []),
        Column(f"offloaded\npredicted\n[{moved.unit}]"),
        Column(f"offloaded\nmeasured\n[{moved.unit}]"),
        Column("tensors\nequal\n"),
        Column("what differs\n\n", words=True),
    )
    notes = tuple(dict.fromkeys(f"{m.model}: {note}" for _, m in pairs for note in m.notes if "steps:" in note))
    return Sheet("Prediction beside measurement", columns, tuple(rows), notes, keys=2)
