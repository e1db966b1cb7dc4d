"""Everything stays: the baseline, as a plan."""

from __future__ import annotations

from vdnn.policies.candidates import survey
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["none"]


@register("none")
def none(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Keeps every saved storage."""
    kept = {item.storage: item.why or "nothing is offloaded" for item in survey(trace, options)}
    return make_plan("none", trace, options, {}, kept)
