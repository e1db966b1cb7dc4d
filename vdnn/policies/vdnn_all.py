"""Every feature map goes: the least memory that offloading can give."""

from __future__ import annotations

from vdnn.policies.algorithms import with_algorithms
from vdnn.policies.feature_maps import offload_maps
from vdnn.policies.options import Options
from vdnn.policies.registry import register
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["vdnn_all", "vdnn_all_m", "vdnn_all_p"]


@register("vdnn-all")
def vdnn_all(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Offloads all feature maps; by the paper's rules the inputs of CONV and POOL layers, and never of FC."""
    notes: tuple[str, ...] = ()
    kinds = ("conv", "pool")
    if options.rules == "paper" and not any(call.kind in kinds for call in trace.modules):
        notes = ("the model has no CONV or POOL layers: by the paper's rules nothing is offloaded, use rules='event'",)
    return offload_maps("vdnn-all", trace, hardware, options, lambda item: "", kinds, notes)


@register("vdnn-all-m")
def vdnn_all_m(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The same with the convolution algorithms that need no workspace: the paper's (m)."""
    return with_algorithms(vdnn_all(trace, hardware, options), "vdnn-all-m", trace, hardware, options, "least")


@register("vdnn-all-p")
def vdnn_all_p(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The same with the fastest convolution algorithms: the paper's (p)."""
    return with_algorithms(vdnn_all(trace, hardware, options), "vdnn-all-p", trace, hardware, options, "fastest")
