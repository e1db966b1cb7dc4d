"""Policies: from a trace and a machine to a plan. Each is a small function, chosen by name.

plan = decide("vdnn-conv", trace, hardware, Options(rules="paper"))
"""

from vdnn.policies import checkpoint, none, vdnn_all, vdnn_conv
from vdnn.policies.options import Options
from vdnn.policies.registry import Policy, decide, find, model_options, names

__all__ = [
    "Options",
    "Policy",
    "checkpoint",
    "decide",
    "find",
    "model_options",
    "names",
    "none",
    "vdnn_all",
    "vdnn_conv",
]
