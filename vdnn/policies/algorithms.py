"""The second half of the paper's policies: which algorithm each convolution runs with.

(m) takes implicit GEMM everywhere, which needs no workspace; (p) the fastest for each layer. Without a table of
algorithms for the machine a plan only says which it wants: the engine turns cuDNN's benchmark on or off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from vdnn.analysis.convolutions import Direction, choices_of, choose
from vdnn.policies.options import Options
from vdnn.values.algorithms import Offer
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["NO_TABLE", "with_algorithms", "with_offers"]

NO_TABLE = "no table of convolution algorithms for {gpu}: time and workspace are those of cuDNN's own choice"


def with_algorithms(
    plan: Plan, policy: str, trace: Trace, hardware: Hardware, options: Options, which: Literal["least", "fastest"]
) -> Plan:
    """The plan under its full name, with the algorithms of least workspace or the fastest."""
    if options.table is None:
        note = NO_TABLE.format(gpu=hardware.id)
        return replace(plan, policy=policy, workspace=which, notes=(*plan.notes, note))
    chosen = choose(trace, options.table, hardware.peak("float32"), which)
    return with_offers(plan, policy, trace, chosen, options.table.id, which)


def with_offers(
    plan: Plan,
    policy: str,
    trace: Trace,
    chosen: Mapping[Direction, Offer],
    table: str,
    which: Literal["least", "fastest", "mixed"],
) -> Plan:
    """The plan under its full name, with these algorithms."""
    choices = choices_of(trace, chosen)
    return replace(plan, policy=policy, workspace=which, algorithm_table=table, convolutions=choices)
