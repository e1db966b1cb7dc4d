"""What stands in the way of an offload: who else holds saved storages, and a peak that lies somewhere else."""

from __future__ import annotations

from vdnn.analysis.encoding import planned
from vdnn.analysis.liveness import op_text, peak
from vdnn.analysis.moments import MOVABLE, Points, resolve
from vdnn.units import format_bytes
from vdnn.values.plan import Keep, Offload, Plan
from vdnn.values.trace import Trace

__all__ = ["remarks"]

# What is less than this share of the saved feature maps, or of the peak, is not worth a line.
_SHARE = 0.05
_NAMED = 3


def remarks(trace: Trace, plan: Plan) -> tuple[str, ...]:
    """Sentences for the log and the report; none where offload does what one expects of it."""
    return tuple(line for line in (_held(trace, plan), _elsewhere(trace, plan)) if line)


def _held(trace: Trace, plan: Plan) -> str:
    """Saved feature maps that others hold until backward, so that a copy on the host frees nothing.

    Those that are too small to move stay whoever holds them, and a step that fits as it is asks for none.
    """
    if plan.policy == "budget" and all(isinstance(entry.action, Keep) for entry in plan.entries):
        return ""
    points = Points(trace)
    first: dict[int, int] = {}  # storage -> its first saved tensor, of a module below the model if there is one
    for number, tensor in enumerate(trace.saved):
        known = first.setdefault(tensor.storage, number)
        if not points.names[known].module and points.names[number].module:
            first[tensor.storage] = number
    maps = [storage for storage in first if trace.storages[storage].category in MOVABLE]
    # the step's own inputs are the training loop's to hold
    held = sorted(
        (s for s in maps if trace.storages[s].held not in ("", "input") and trace.storages[s].nbytes >= plan.min_bytes),
        key=lambda s: -trace.storages[s].nbytes,
    )
    nbytes = sum(trace.storages[s].nbytes for s in held)
    if nbytes == 0 or nbytes < _SHARE * sum(trace.storages[s].nbytes for s in maps):
        return ""
    named = [
        f"{points.names[first[s]]} ({format_bytes(trace.storages[s].nbytes)}, held by {trace.storages[s].held})"
        for s in held[:_NAMED]
    ]
    more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
    return (
        f"{format_bytes(nbytes)} of saved feature maps cannot leave, because others hold them until backward: "
        f"{', '.join(named)}{more}; do not keep them, and they can be offloaded"
    )


def _elsewhere(trace: Trace, plan: Plan) -> str:
    """Where the peak is that moving feature maps does not lower."""
    if not any(isinstance(entry.action, Offload) for entry in plan.entries):
        return ""
    step = planned(trace, plan)
    before, after = peak(trace), peak(step, resolve(plan, step))
    if before.nbytes - after.nbytes >= _SHARE * before.nbytes:
        return ""
    filling = ", ".join(
        f"{item.category.replace('_', ' ')} {format_bytes(item.nbytes)}" + (f" of {item.module}" if item.module else "")
        for item in after.items[:_NAMED]
    )
    was, now = format_bytes(before.nbytes), format_bytes(after.nbytes)
    change = (
        f"only from {was} to {now}" if after.nbytes < before.nbytes else f"not at all: it rises from {was} to {now}"
    )
    if was == now:
        change = f"of {was} not at all"
    return f"this offload lowers the peak {change}; it lies at {op_text(step, after.op)}, filled by {filling}"
