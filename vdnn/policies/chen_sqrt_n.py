"""Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost" (2016): recompute all but every √n-th.

The n feature maps that backward needs are cut into √n segments. The first of each stays; backward computes the
others of a segment again, once, when it comes to it. What draws random numbers stays, too. Simulated only: the
engine recomputes by block, with the policy `checkpoint`.
"""

from __future__ import annotations

import math

from vdnn.analysis.chains import makers
from vdnn.analysis.recomputing import makeable, regenerators
from vdnn.policies.candidates import survey
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan, Recompute
from vdnn.values.trace import Trace

__all__ = ["chen_sqrt_n"]


@register("chen-sqrt-n")
def chen_sqrt_n(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Drops all but every √n-th feature map."""
    made = makers(trace)
    saved = survey(trace, options)
    kept = {item.storage: item.why for item in saved}
    again = []
    for item in saved:
        if item.movable:
            if regenerators(trace, item.storage, made) is None:
                kept[item.storage] = "cannot be computed again: an input, or random"
            else:
                again.append(item)
    again.sort(key=lambda item: trace.storages[item.storage].alloc)
    length = max(1, math.isqrt(len(again)))
    possible = makeable(trace, [item.storage for i, item in enumerate(again) if i % length])
    dropped = [item for item in again if item.storage in possible]
    actions = {item.storage: Recompute(f"segments of {length} feature maps") for item in dropped}
    for i, item in enumerate(again):
        if item.storage not in possible:
            kept[item.storage] = "depends on what may not be made twice" if i % length else "the first of its segment"
    note = (
        f"recomputes {len(dropped)} of {len(again)} feature maps, {format_bytes(sum(i.nbytes for i in dropped))}, "
        f"in segments of {length}"
    )
    return make_plan("chen-sqrt-n", trace, options, actions, kept, notes=(note,))
