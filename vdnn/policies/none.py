"""Everything stays: the baseline, as a plan."""

from __future__ import annotations

from vdnn.policies.algorithms import with_algorithms
from vdnn.policies.candidates import survey
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["none", "none_m", "none_p"]


@register("none")
def none(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Keeps every saved storage."""
    kept = {item.storage: item.why or "nothing is offloaded" for item in survey(trace, options)}
    return make_plan("none", trace, options, {}, kept)


@register("none-m")
def none_m(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The same with the convolution algorithms that need no workspace: the paper's (m)."""
    return with_algorithms(none(trace, hardware, options), "none-m", trace, hardware, options, "least")


@register("none-p")
def none_p(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The same with the fastest convolution algorithms: the paper's (p)."""
    return with_algorithms(none(trace, hardware, options), "none-p", trace, hardware, options, "fastest")
