"""Policies: from a trace and a machine to a plan. Each is a small function, chosen by name.

plan = decide("vdnn-conv", trace, hardware, Options(rules="paper"))
"""

from vdnn.policies import (
    capuchin,
    checkpoint,
    chen_sqrt_n,
    encode,
    none,
    peers,
    recompute,
    vdnn_all,
    vdnn_conv,
    vdnn_dyn,
    vdnn_plus_plus,
)
from vdnn.policies.checkpoint import recomputed_blocks
from vdnn.policies.options import Options
from vdnn.policies.registry import Policy, decide, distinct, find, model_options, must_run, names, summary
from vdnn.policies.remarks import remarks

__all__ = [
    "Options",
    "Policy",
    "capuchin",
    "checkpoint",
    "chen_sqrt_n",
    "decide",
    "distinct",
    "encode",
    "find",
    "model_options",
    "must_run",
    "names",
    "none",
    "peers",
    "recompute",
    "recomputed_blocks",
    "remarks",
    "summary",
    "vdnn_all",
    "vdnn_conv",
    "vdnn_dyn",
    "vdnn_plus_plus",
]
