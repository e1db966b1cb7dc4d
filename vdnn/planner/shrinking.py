"""Policies that decide for a budget, on a machine whose allocator needs more than the bytes that live.

`vdnn-dyn` and `capuchin` judge by live bytes, which is what vDNN's pool and a virtual device count. PyTorch's caching
allocator rounds and fragments: if a plan does not fit its model, the policy is asked again for as much less as was
missing. That may ask too much: what is missing now need not be missing from a plan that moves more, and a convolution's
workspace, which lives, is done without where it finds no room. So what `vdnn-dyn` chooses from is tried last.
"""

from __future__ import annotations

from dataclasses import replace

from vdnn.errors import InfeasibleError
from vdnn.policies import Options, decide
from vdnn.sim import simulate_step
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["BUDGETED", "budgeted_plan"]

BUDGETED = ("vdnn-dyn", "capuchin")
_TRIES = 12


def budgeted_plan(policy: str, trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The plan of such a policy that fits into the machine's memory, or into `options.budget_bytes`.

    Where none was found to fit, `capuchin` gives the last one that it tried.

    Raises:
        InfeasibleError: of vdnn-dyn, not even offloading all fits.
    """
    there = options.budget_bytes or hardware.available_bytes
    try:
        return _shrunk(policy, trace, hardware, options, there)
    except InfeasibleError:
        plan = _fixed(trace, hardware, options, there) if policy == "vdnn-dyn" else None
        if plan is None:
            raise
        return plan


def _fixed(trace: Trace, hardware: Hardware, options: Options, there: int) -> Plan | None:
    """The first that fits of the plans that vdnn-dyn chooses from, as the allocator's model has it."""
    names = ("vdnn-conv-p", "vdnn-all-p", "vdnn-all-m") if options.table else ("vdnn-conv-m", "vdnn-all-m")
    for name in names:
        plan = decide(name, trace, hardware, replace(options, budget_bytes=None))
        if simulate_step(trace, plan, hardware, memory_limit=there, regime=options.regime).fits:
            chosen = f"{name.split('-')[1]}({name[-1]})"
            why = f"by the bytes that live nothing fits into {format_bytes(there)}, by the allocator's model it does"
            notes = (f"vdnn-dyn chose {chosen}", why, *plan.notes)
            return replace(plan, policy="vdnn-dyn", budget_bytes=options.budget_bytes, notes=notes)
    return None


def _shrunk(policy: str, trace: Trace, hardware: Hardware, options: Options, there: int) -> Plan:
    budget = there
    for _ in range(_TRIES):
        try:
            plan = decide(policy, trace, hardware, replace(options, budget_bytes=budget))
        except InfeasibleError as error:
            if budget == there:
                raise
            raise InfeasibleError(
                f"{error} (of {format_bytes(there)} the allocator's rounding and fragmentation leave no more)"
            ) from None
        result = simulate_step(trace, plan, hardware, memory_limit=there, regime=options.regime)
        if budget < there:
            note = f"decided for {format_bytes(budget)}: the allocator's model takes the rest of {format_bytes(there)}"
            plan = replace(plan, notes=(plan.notes[0], note, *plan.notes[1:]))
        plan = replace(plan, budget_bytes=options.budget_bytes)
        if result.fits:
            return plan
        missing = (result.peak_reserved_bytes or result.peak_requested_bytes or 0) - there
        budget -= max(missing, there >> 6)
        if budget <= 0:
            break
    if policy == "capuchin":
        return plan
    raise InfeasibleError(
        f"{policy}: no pass fits {trace.model} (batch {trace.batch}) into {format_bytes(there)} as the allocator's "
        "model has it: give more memory, or a smaller batch"
    )
