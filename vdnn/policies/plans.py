"""From decisions about storages to a `Plan`: names, reasons, and whether storages move whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vdnn.analysis.moments import Points, extent
from vdnn.policies.options import Options
from vdnn.values.plan import Action, Entry, Keep, Plan
from vdnn.values.trace import Trace

__all__ = ["covers_half", "make_plan"]


def covers_half(trace: Trace, storage: int, tensors: tuple[int, ...]) -> bool:
    """Whether the saved views span at least half of their storage together: then it moves whole."""
    covered = end = 0
    for first, nbytes in sorted(extent(trace.saved[i]) for i in tensors):
        covered += max(0, first + nbytes - max(first, end))
        end = max(end, first + nbytes)
    return 2 * covered >= trace.storages[storage].nbytes


def make_plan(
    policy: str,
    trace: Trace,
    options: Options,
    moved: Mapping[int, Action],
    kept: Mapping[int, str],
    inflight_bytes: int | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """A plan with one entry a saved storage, in the order of first packs."""
    points = Points(trace)
    tensors: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        tensors.setdefault(t.storage, []).append(i)
    entries = []
    for storage, found in tensors.items():
        action = moved.get(storage) or Keep(kept.get(storage, ""))
        names = tuple(points.names[i] for i in found)
        entries.append(Entry(names, trace.storages[storage].nbytes, action))
    plan = Plan(
        policy=policy,
        model=trace.model,
        batch=trace.batch,
        device=trace.device,
        trace=trace.fingerprint(),
        budget_bytes=None,
        entries=tuple(entries),
        min_bytes=options.min_bytes,
        notes=notes,
    )
    return plan if inflight_bytes is None else replace(plan, max_inflight_bytes=inflight_bytes)
