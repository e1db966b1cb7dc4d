"""Policies: from a trace and a machine to a plan. Each is a small function, chosen by name.

plan = decide("vdnn-conv", trace, hardware, Options(rules="paper"))
"""

from vdnn.policies import none, vdnn_all, vdnn_conv
from vdnn.policies.options import Options
from vdnn.policies.registry import Policy, decide, find, names

__all__ = ["Options", "Policy", "decide", "find", "names", "none", "vdnn_all", "vdnn_conv"]
