"""Policies that decide for a budget, judged by the allocator's model."""

from __future__ import annotations

import vdnn
from vdnn.errors import InfeasibleError
from vdnn.planner import budgeted_plan
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.values import hardware


def test_dyn_fits_wherever_a_policy_fits_that_it_chooses_from() -> None:
    """Asked for as much less as was missing, it gave up between 101 and 103 MiB, where vdnn-all fits."""
    machine, options = hardware("t4"), Options(min_bytes=1)
    trace = vdnn.capture(vdnn.load("demo:cnn", 16), optimizer="sgd")
    plans = [decide(name, trace, machine, options) for name in ("vdnn-conv", "vdnn-all")]
    fitting = 0
    for memory in [*range(80 << 20, 86 << 20, 1 << 20), *range(99 << 20, 105 << 20, 1 << 20)]:
        try:
            made = budgeted_plan("vdnn-dyn", trace, machine, Options(min_bytes=1, budget_bytes=memory))
        except InfeasibleError:
            assert not any(simulate_step(trace, plan, machine, memory_limit=memory).fits for plan in plans)
        else:
            fitting += 1
            assert simulate_step(trace, made, machine, memory_limit=memory).fits
            assert made.policy == "vdnn-dyn"
            assert made.notes[0].startswith("vdnn-dyn chose ")
    assert 6 <= fitting < 12
