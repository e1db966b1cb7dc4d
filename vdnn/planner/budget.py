"""Offload no more than a budget asks for: the plan that fits and, of those tried, takes the least time.

What is saved first is needed last, so it has the longest time to go and to come back. So the storages are
taken in the order of forward, as many as it needs for the step to fit; how many is found by bisection, with
the simulator as the judge. `vdnn-conv` is tried beside, for what it moves is the easiest to hide.

    wide     many bytes may be on their way at once: few stalls, but memory for them
    narrow   one storage at a time, as in vDNN
    none     nothing runs ahead of its use: the least memory, at the price of stalls; only if it must be
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vdnn.errors import InfeasibleError, UsageError
from vdnn.policies import Options, decide
from vdnn.policies.candidates import Saved, survey
from vdnn.policies.event_rules import event_actions, needed_soon
from vdnn.policies.plans import make_plan
from vdnn.sim import simulate_step
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.result import RunResult
from vdnn.values.trace import Trace

__all__ = ["plan_for_budget"]

# Bytes on their way at once, each direction, in largest storages.
_WIDTHS = (1, 8)
_Judged = tuple[Plan, RunResult]


def plan_for_budget(trace: Trace, hardware: Hardware, budget_bytes: int, options: Options | None = None) -> Plan:
    """The plan for a step that must fit into `budget_bytes` of device memory.

    Raises:
        UsageError: a budget that is not positive, or an option that cannot be.
        InfeasibleError: no plan fits; names the least budget found that does, and what fills it.
    """
    if budget_bytes <= 0:
        raise UsageError(f"a budget of {budget_bytes} bytes holds nothing: give one like 12GiB")
    options = options or Options()
    options.check()

    def judged(plan: Plan) -> _Judged:
        return plan, simulate_step(trace, plan, hardware, memory_limit=budget_bytes)

    none = judged(decide("none", trace, hardware, options))
    if none[1].fits:
        note = f"the step fits into {format_bytes(budget_bytes)} without offload ({_peak(none[1])})"
        return replace(none[0], policy="budget", budget_bytes=budget_bytes, notes=(note,))
    saved = survey(trace, options)
    kept = {item.storage: item.why for item in saved if not item.movable}
    movable = [item for item in saved if item.movable]
    soon = needed_soon(trace, hardware, movable)
    tried: list[_Judged] = []
    later = [item for item in movable if item.storage not in soon]
    largest = max((item.nbytes for item in movable), default=0)
    wide = [replace(options, max_inflight_bytes=n * largest, window_bytes=n * largest) for n in _WIDTHS]
    # the last also moves what backward needs soon, and nothing runs ahead: that stalls, but may be what it takes
    for items, choice in (
        *((later, choice) for choice in wide),
        (movable, replace(options, window_bytes=0, max_inflight_bytes=0)),
    ):
        if choice.window_bytes == 0 and any(result.fits for _, result in tried):
            break

        def first(count: int, items: list[Saved] = items, choice: Options = choice) -> _Judged:
            actions, inflight = event_actions(trace, items[:count], choice)
            rest = {item.storage: "the budget does not ask for it" for item in items[count:]}
            late = dict.fromkeys(soon, "needed before its copy out could be over")
            return judged(make_plan("budget", trace, choice, actions, {**late, **rest, **kept}, inflight))

        everything = first(len(items))
        tried.append(everything)
        if everything[1].fits:
            tried.append(_fewest(first, len(items)))
    tried.append(judged(decide("vdnn-conv", trace, hardware, replace(options, rules="event"))))
    fitting = [pair for pair in tried if pair[1].fits]
    if not fitting:
        raise _impossible(trace, budget_bytes, [result for _, result in tried])
    plan, result = min(fitting, key=lambda pair: (pair[1].iteration_time_ns or 0, pair[0].offloaded_bytes))
    moved = sum(entry.action.action == "offload" for entry in plan.entries)
    note = (
        f"offloads {moved} of {len(plan.entries)} saved storages, {format_bytes(plan.offloaded_bytes)}, to fit into "
        f"{format_bytes(budget_bytes)}: predicted {_peak(result)}, "
        f"{(result.iteration_time_ns or 0) / max(none[1].iteration_time_ns or 1, 1):.2f} times the time"
    )
    return replace(plan, policy="budget", budget_bytes=budget_bytes, notes=(note,))


def _fewest(first: Callable[[int], _Judged], most: int) -> _Judged:
    """The least number of storages that fits, if fitting were monotone; else one that fits."""
    low, high, found = 0, most, first(most)  # `low` does not fit, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        pair = first(middle)
        if pair[1].fits:
            high, found = middle, pair
        else:
            low = middle
    return found


def _peak(result: RunResult) -> str:
    for level in ("reserved", "allocated", "requested"):
        nbytes = getattr(result, f"peak_{level}_bytes")
        if nbytes is not None:
            return f"{format_bytes(nbytes)} {level}"
    return "no peak"


def _impossible(trace: Trace, budget_bytes: int, results: list[RunResult]) -> InfeasibleError:
    def least(result: RunResult) -> int:
        return result.peak_reserved_bytes or result.peak_allocated_bytes or result.peak_requested_bytes or 0

    best = min(results, key=least)
    sums: dict[str, int] = {}
    for item in best.peak_items:
        sums[item.category] = sums.get(item.category, 0) + item.nbytes
    filling = ", ".join(
        f"{category.replace('_', ' ')} {format_bytes(nbytes)}"
        for category, nbytes in sorted(sums.items(), key=lambda pair: -pair[1])[:4]
    )
    top = ", ".join(f"{i.module} {format_bytes(i.nbytes)}" for i in best.peak_items[:3] if i.module)
    return InfeasibleError(
        f"no plan found fits {trace.model} (batch {trace.batch}) into {format_bytes(budget_bytes)}: the least is "
        f"{_peak(best)}, at {best.peak_at}, filled by {filling}"
        + (f" (largest: {top})" if top else "")
        + "; give that budget, or a smaller batch"
    )
