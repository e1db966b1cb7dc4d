"""Which GPU for a model: on each, whether the step fits, with what plan, how long it takes, and what fitting costs.

The step is captured once (and once more with its repeated blocks recomputed), and planned for each GPU's memory, less
what CUDA takes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vdnn.errors import InfeasibleError
from vdnn.planner import best_plan, least_plan
from vdnn.policies import Options
from vdnn.sim import simulate_step
from vdnn.values import Hardware, Keep, Offload, Recompute, RunResult, Trace

__all__ = ["Advice", "advise"]


@dataclass(frozen=True, slots=True)
class Advice:
    """A model on one GPU, of whose `memory_bytes` a step can have `available_bytes`.

    `how` is "as it is", what the plan does ("offload", "recompute", "blocks", joined by "+"), or "" where nothing
    fits; `needs_bytes` is the reserved peak, or the least budget known where nothing fits. `free_time_ns` is the step
    with unlimited memory, `time_ns` the step that fits, `bound_ns` what no plan goes below. `result` is the step in the
    GPU's memory under the plan, `without` without one; where nothing fits both are the latter.
    """

    gpu: str
    memory_bytes: int
    available_bytes: int
    fits: bool
    how: str
    needs_bytes: int
    time_ns: int | None
    free_time_ns: int
    bound_ns: int | None
    offloaded_bytes: int
    samples_per_s: float | None
    result: RunResult
    without: RunResult

    @property
    def slowdown(self) -> float | None:
        """The step that fits over the one with unlimited memory."""
        return None if self.time_ns is None else self.time_ns / max(self.free_time_ns, 1)


def advise(
    trace: Trace,
    blocks: Trace | None,
    machines: Iterable[Hardware],
    options: Options | None = None,
    progress: Callable[[str], None] = lambda gpu: None,
) -> list[Advice]:
    """A line for each GPU, the fastest first; those on which nothing fits come last."""
    found = []
    for machine in machines:
        progress(machine.id)
        budget = machine.available_bytes
        free = simulate_step(trace, None, machine, memory_limit=1 << 60)
        free_ns = free.iteration_time_ns or 0
        try:
            planned = best_plan(trace, machine, budget, options, blocks=blocks)
        except InfeasibleError:
            steps = [step for step in (trace, blocks) if step is not None]
            needs = min(least_plan(step, machine, options).plan.budget_bytes or 0 for step in steps)
            plain = simulate_step(trace, None, machine, memory_limit=budget)
            found.append(
                Advice(
                    machine.id,
                    machine.memory_bytes,
                    budget,
                    False,
                    "",
                    needs,
                    None,
                    free_ns,
                    None,
                    0,
                    None,
                    plain,
                    plain,
                )
            )
            continue
        time_ns = planned.result.iteration_time_ns or 0
        actions = [entry.action for entry in planned.plan.entries]
        parts = ["blocks"] if planned.trace is blocks else []
        parts += ["recompute"] if any(isinstance(action, Recompute) for action in actions) else []
        parts += ["offload"] if any(isinstance(action, Offload) for action in actions) else []
        parts += ["encode"] if any(not isinstance(a, Keep | Offload | Recompute) for a in actions) else []
        found.append(
            Advice(
                machine.id,
                machine.memory_bytes,
                budget,
                True,
                "+".join(parts) or "as it is",
                planned.result.peak_reserved_bytes or planned.result.peak_requested_bytes or 0,
                time_ns,
                free_ns,
                planned.bound.time_ns,
                planned.result.offloaded_bytes or 0,
                trace.batch * 1e9 / time_ns if time_ns else None,
                planned.result,
                planned.without,
            )
        )
    return sorted(found, key=lambda one: (one.time_ns is None, one.time_ns or one.needs_bytes - one.available_bytes))
