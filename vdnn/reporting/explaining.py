"""A plan in words for people who must decide: module by module, and GPU by GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vdnn.reporting.scale import NOTHING, byte_scale, time_scale
from vdnn.reporting.sheet import Column, Sheet
from vdnn.reporting.summaries import plan_rows
from vdnn.units import format_bytes
from vdnn.values import Plan, RunResult

__all__ = ["ExplainedRow", "advice_table", "explained", "explanation"]


@dataclass(frozen=True, slots=True)
class ExplainedRow:
    """What a plan does with what one module call saves, by action; times are from the start of the step.

    `out_ns` is when its last copy is on the host, `back_ns` when the first comes back: None for what stays. `waits_ns`
    is how long compute waits for its copies.
    """

    module: str
    action: str
    storages: int
    nbytes: int
    out_ns: int | None
    back_ns: int | None
    waits_ns: int
    why: str


def explained(plan: Plan, result: RunResult) -> tuple[ExplainedRow, ...]:
    """One row for each module call and action, in the plan's order; the result must have its timeline."""
    out: dict[str, int] = {}
    back: dict[str, int] = {}
    waits: dict[str, int] = {}
    if result.timeline is not None:
        for span in result.timeline.spans:
            if span.stream == "offload":
                out[span.what] = max(out.get(span.what, 0), span.end_ns)
            elif span.stream == "prefetch":
                back[span.what] = min(back.get(span.what, span.start_ns), span.start_ns)
        for stall in result.timeline.stalls:
            waits[stall.what] = waits.get(stall.what, 0) + stall.end_ns - stall.start_ns
    groups: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    reasons = {}
    for row in plan_rows(plan):
        reasons[row.saved] = row.why
        key = (row.module, row.action, row.why if row.action == "keep" else "")
        groups.setdefault(key, []).append((row.saved, row.storage_bytes))
    found = []
    for (module, action, why), members in groups.items():
        names = [name for name, _ in members]
        waited = sum(waits.get(name, 0) for name in names)
        hidden = "compute waits for the link" if waited else "free: compute hides the copies"
        own = why or reasons[names[0]] or (hidden if action == "offload" else "")
        leaves = [out[name] for name in names if name in out]
        returns = [back[name] for name in names if name in back]
        nbytes = sum(size for _, size in members)
        found.append(
            ExplainedRow(
                module, action, len(names), nbytes, max(leaves, default=None), min(returns, default=None), waited, own
            )
        )
    return tuple(found)


def explanation(plan: Plan, result: RunResult, least_bytes: int = 1 << 20) -> Sheet:
    """The rows as a table; what is kept and smaller than `least_bytes` is one line."""
    rows = explained(plan, result)
    small = [row for row in rows if row.action == "keep" and row.nbytes < least_bytes]
    shown = [row for row in rows if row not in small]
    size = byte_scale(row.nbytes for row in shown)
    time = time_scale([result.iteration_time_ns])
    cells = [
        (
            row.module,
            row.action,
            size.text(row.nbytes),
            time.text(row.out_ns),
            time.text(row.back_ns),
            time.text(row.waits_ns) if row.waits_ns else NOTHING,
            row.why or NOTHING,
        )
        for row in shown
    ]
    if small:
        nbytes = size.text(sum(row.nbytes for row in small))
        cells.append(
            (f"{len(small)} more", "keep", nbytes, NOTHING, NOTHING, NOTHING, f"each below {format_bytes(least_bytes)}")
        )
    columns = (
        Column("module", words=True),
        Column("action", words=True),
        Column(f"saved\n[{size.unit}]"),
        Column(f"gone at\n[{time.unit}]"),
        Column(f"back from\n[{time.unit}]"),
        Column(f"waited for\n[{time.unit}]"),
        Column("why", words=True),
    )
    title = f"{plan.policy} · {plan.model} · batch {plan.batch} · {result.gpu}"
    return Sheet(title, columns, tuple(cells), plan.notes)


def advice_table(rows: Sequence[dict[str, Any]], title: str) -> Sheet:
    """A model on each GPU (`vdnn.advising`): fits, how, time, and what fitting costs."""
    size = byte_scale(row["available_bytes"] for row in rows)
    time = time_scale(row["free_time_ns"] for row in rows)
    cells = []
    for row in rows:
        slowdown = row["slowdown"]
        cells.append(
            (
                row["gpu"],
                size.text(row["available_bytes"]),
                "yes" if row["fits"] else "no",
                row["how"] or NOTHING,
                size.text(row["needs_bytes"]),
                time.text(row["free_time_ns"]),
                time.text(row["time_ns"]),
                NOTHING if slowdown is None else f"{100 * (slowdown - 1):.1f}",
                NOTHING if row["samples_per_s"] is None else f"{row['samples_per_s']:.1f}",
            )
        )
    columns = (
        Column("GPU", words=True),
        Column(f"memory\n[{size.unit}]"),
        Column("fits", words=True),
        Column("how", words=True),
        Column(f"needs\n[{size.unit}]"),
        Column(f"without limit\n[{time.unit}]"),
        Column(f"predicted\n[{time.unit}]"),
        Column("costs\n[%]"),
        Column("samples\n[1/s]"),
    )
    notes = (
        "Memory: of the card, less CUDA's context. How: what is done to feature maps, or blocks: the model's repeated "
        "blocks run again.",
        "Where nothing fits, `needs` is the least budget known. `costs`: against the same GPU with unlimited memory.",
    )
    return Sheet(title, columns, tuple(cells), notes)
