"""Only what convolutions save goes: their arithmetic is long enough to hide the copy (paper, §III)."""

from __future__ import annotations

import re

from vdnn.policies.algorithms import with_algorithms
from vdnn.policies.candidates import Saved
from vdnn.policies.feature_maps import offload_maps
from vdnn.policies.options import Options
from vdnn.policies.registry import register
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import SavedTensor, Trace

__all__ = ["vdnn_conv", "vdnn_conv_m", "vdnn_conv_p"]

_PRODUCT = re.compile(r"(Addmm|Mm|Bmm|Baddbmm|Addbmm|Addmv|Mv|Linear|ScaledDotProduct\w*|\w*Attention\w*)Backward\d*")


def _by_conv(trace: Trace, t: SavedTensor) -> bool:
    return "Convolution" in t.node or (t.module >= 0 and trace.modules[t.module].kind == "conv")


def _by_product(trace: Trace, t: SavedTensor) -> bool:
    return _PRODUCT.fullmatch(t.node) is not None or (t.module >= 0 and trace.modules[t.module].kind == "linear")


@register("vdnn-conv")
def vdnn_conv(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Offloads what convolutions save; without any, what matrix products and attention save, and says so."""
    conv = any(_by_conv(trace, t) for t in trace.saved)
    saved_by = _by_conv if conv else _by_product
    what = "a convolution" if conv else "a matrix product or attention"
    note = (
        "the model has no CONV layers: offloads what its matrix products and attention save instead, "
        "because theirs is the arithmetic that is long enough to hide a copy"
    )

    def refuse(item: Saved) -> str:
        if any(saved_by(trace, trace.saved[i]) for i in item.tensors):
            return ""
        return f"not saved by {what}"

    return offload_maps(
        "vdnn-conv",
        trace,
        hardware,
        options,
        refuse,
        ("conv",) if conv else ("linear", "attention"),
        () if conv else (note,),
    )


@register("vdnn-conv-m")
def vdnn_conv_m(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The same with the convolution algorithms that need no workspace: the paper's (m)."""
    return with_algorithms(vdnn_conv(trace, hardware, options), "vdnn-conv-m", trace, hardware, options, "least")


@register("vdnn-conv-p")
def vdnn_conv_p(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The same with the fastest convolution algorithms: the paper's (p)."""
    return with_algorithms(vdnn_conv(trace, hardware, options), "vdnn-conv-p", trace, hardware, options, "fastest")
