"""Plans for budgets beside the policies and the bound: the numbers of one model on one GPU.

    least      the least budget that the planner knows a plan for; of each policy, the least memory that it runs in
    baseline   reserved bytes of the step without a plan
    budgets    least + percent of (baseline - least): the plan, the bound, and each policy where it fits

A policy that is asked for a budget (vdnn-dyn, capuchin) is asked for this one. Those whose recomputation the engine
does not execute are marked `simulated_only`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vdnn.errors import FormatError, InfeasibleError, UsageError
from vdnn.experiment.study import STUDY, Model, Study, made_of
from vdnn.planner import BUDGETED, best_plan, budgeted_plan, gap_parts, least_memory, least_plan
from vdnn.policies import Options, decide, find
from vdnn.policies import model_options as options_of
from vdnn.sim import simulate_step
from vdnn.sim.workspaces import held_bytes
from vdnn.values import Hardware, Plan, Recompute, RunResult, Trace

__all__ = ["FRONTIER", "WORSE", "Frontier", "frontier_of", "read_frontier"]

WORSE = 0.2  # a gap beyond this is explained
_UNBOUNDED = 1 << 60
# The keys of its table in an experiment: type, default (... where there is none).
FRONTIER: dict[str, tuple[Any, Any]] = {
    **STUDY,
    "precision": (str, "amp"),
    "policies": (list, ...),
    "percents": (list, ...),
    "shown": (list, []),
}


@dataclass(frozen=True, slots=True)
class Frontier(Study):
    """Plans for budgets beside the policies: `percents` are of the way from the least budget to the step's own."""

    precision: str
    policies: tuple[str, ...]
    percents: tuple[int, ...]
    shown: tuple[str, ...]


def read_frontier(read: dict[str, Any], models: tuple[Model, ...], where: str) -> Frontier:
    """A frontier from its table, whose keys and models were checked.

    Raises:
        FormatError: percents that are none.
        UsageError: an unknown policy.
    """
    for policy in read["policies"]:
        find(str(policy))
    if not all(percent in range(101) for percent in read["percents"]):
        raise FormatError(f"{where}: percents is {read['percents']!r}, it must hold numbers from 0 to 100")
    return made_of(Frontier, read, models)


def frontier_of(
    trace: Trace,
    blocks: Trace | None,
    machine: Hardware,
    percents: Sequence[int],
    policies: Sequence[str],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Everything about one model on one GPU; `blocks` is its step with the repeated blocks recomputed."""
    without = simulate_step(trace, None, machine, memory_limit=_UNBOUNDED)
    baseline = without.peak_reserved_bytes or 0
    steps = [step for step in (trace, blocks) if step is not None]
    least = min(least_plan(step, machine).plan.budget_bytes or 0 for step in steps)
    fixed: dict[str, tuple[Trace, Plan, RunResult]] = {}
    for name in policies:
        step = blocks if "checkpoint" in options_of(name) else trace
        if step is None or name in BUDGETED:
            continue
        progress(name)
        try:
            plan = decide(name, step, machine, Options())
        except UsageError:
            continue
        fixed[name] = (step, plan, simulate_step(step, plan, machine, memory_limit=_UNBOUNDED))
    found: dict[str, Any] = {
        "ops": len(trace.ops),
        "saved": len({t.storage for t in trace.saved}),
        "time_ns": without.iteration_time_ns,
        "baseline_bytes": baseline,
        "least_bytes": least,
        "requested_bytes": without.peak_requested_bytes,
        "resident_bytes": _resident(trace, machine),
        "requested_bound_bytes": least_memory(trace),
        "policies": {name: _policy(*fixed[name], machine) for name in fixed},
        "budgets": {},
    }
    for percent in percents:
        budget = least + (baseline - least) * percent // 100
        progress(f"{percent} %")
        begin = time.process_time()
        try:
            planned = best_plan(trace, machine, budget, blocks=blocks)
        except InfeasibleError:
            continue  # a little more memory than the least may fit worse: the allocator's fragments are not monotone
        seconds = time.process_time() - begin
        others = {}
        for name, (step, plan, free) in fixed.items():
            result = simulate_step(step, plan, machine, memory_limit=budget)
            if result.fits:
                others[name] = free.iteration_time_ns
        for name in (name for name in policies if name in BUDGETED):
            try:
                plan = budgeted_plan(name, trace, machine, replace(Options(), budget_bytes=budget))
            except InfeasibleError:
                continue
            result = simulate_step(trace, plan, machine, memory_limit=budget)
            if result.fits:
                others[name] = result.iteration_time_ns
        found["budgets"][str(percent)] = {
            "budget_bytes": budget,
            "time_ns": planned.result.iteration_time_ns,
            "bound_ns": planned.bound.time_ns,
            "why": planned.bound.why,
            "peak_reserved_bytes": planned.result.peak_reserved_bytes,
            "peak_requested_bytes": planned.result.peak_requested_bytes,
            "stall_ns": planned.result.stall_ns,
            "offloaded_bytes": planned.result.offloaded_bytes,
            "recomputed_bytes": sum(e.storage_bytes for e in planned.plan.entries if isinstance(e.action, Recompute)),
            "blocks": planned.trace is blocks,
            "cpu_seconds": round(seconds, 2),
            "gap": asdict(gap_parts(planned, trace, machine)) if planned.gap > WORSE else None,
            "policies": others,
        }
    return found


def _resident(trace: Trace, machine: Hardware) -> int:
    """What is there before the step and stays: weights, buffers, kept gradients, states, cuBLAS' workspaces."""
    stay = ("parameter", "buffer", "gradient", "optimizer_state")
    return held_bytes(trace, machine) + sum(s.nbytes for s in trace.storages if s.alloc < 0 and s.category in stay)


def _policy(step: Trace, plan: Plan, free: RunResult, machine: Hardware) -> dict[str, Any]:
    """A policy's time, and the least memory that it runs in, to a 256th."""
    low, high = (free.peak_requested_bytes or 1) - 1, free.peak_reserved_bytes or 1
    while high - low > max(high >> 8, 1 << 20):
        middle = (low + high) // 2
        if simulate_step(step, plan, machine, memory_limit=middle).fits:
            high = middle
        else:
            low = middle
    alone = any(isinstance(a := e.action, Recompute) and not (a.through or a.block) for e in plan.entries)
    return {"time_ns": free.iteration_time_ns, "least_bytes": high, "simulated_only": alone}
