"""A plan for another batch or sequence length: the same decisions, by name, with the sizes of the other step.

A plan names saved tensors and points by module, call and number, which another batch does not change; only bytes do.
Whether the plan still fits is the simulator's to say.
"""

from __future__ import annotations

from dataclasses import replace

from vdnn.analysis.moments import Points
from vdnn.errors import PlanMismatchError
from vdnn.values.plan import Entry, Plan
from vdnn.values.trace import Trace

__all__ = ["scaled_plan"]


def scaled_plan(plan: Plan, trace: Trace) -> Plan:
    """The plan with the sizes of a step of the same model with other inputs.

    Raises:
        PlanMismatchError: the step saves other tensors, or shares storages in another way.
    """
    if plan.device != trace.device:
        raise PlanMismatchError(f"the plan is for a {plan.device} device, the step for {trace.device}: plan it anew")
    points = Points(trace)
    entries = []
    seen: set[int] = set()
    for entry in plan.entries:
        numbers = []
        for name in entry.saved:
            number = points.saved_at(name.module, name.call, name.index)
            here = None if number is None else points.names[number]
            if number is None or here is None or (here.dtype, here.rank) != (name.dtype, name.rank):
                raise PlanMismatchError(
                    f"the step of {trace.model} does not save {name} as the plan's did: plan it anew"
                )
            numbers.append(number)
        storages = {trace.saved[number].storage for number in numbers}
        if len(storages) != 1 or storages & seen:
            raise PlanMismatchError(f"{entry.saved[0]} shares its storage in another way here: plan it anew")
        seen |= storages
        nbytes = trace.storages[next(iter(storages))].nbytes
        entries.append(Entry(tuple(points.names[number] for number in numbers), nbytes, entry.action))
    note = f"the plan for batch {plan.batch}, scaled to batch {trace.batch}"
    return replace(
        plan, model=trace.model, batch=trace.batch, trace=trace.fingerprint(), entries=tuple(entries), notes=(note,)
    )
