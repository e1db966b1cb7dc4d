"""The plan that fits into a budget and takes the least time of all that were tried, and how good it can be at most.

    without a plan         if the step fits as it is, nothing is done
    the policies           all whose plans the engine executes: the plan is never slower than theirs
    the search             vdnn.planner.search and improving: blocks that run again, and of every other storage whether
                           it is kept, offloaded, encoded or computed again
    the bound              vdnn.planner.bound: no plan is faster; the plan's notes say the gap

Every plan was simulated, with the budget as the limit of reserved memory, before it is returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from vdnn.analysis.blocks import repeated
from vdnn.analysis.encoding import planned
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import Move, resolve
from vdnn.costs import times_with
from vdnn.errors import InfeasibleError, UsageError
from vdnn.planner.bound import Bound, time_bound
from vdnn.planner.choices import Choice
from vdnn.planner.collecting import without_collecting
from vdnn.planner.improving import Improving
from vdnn.planner.search import LONG, Found, Search
from vdnn.policies import Options, decide, recomputed_blocks
from vdnn.sim import simulate_step
from vdnn.sim.allocator_step import fits, step_memory
from vdnn.sim.run import run
from vdnn.sim.workspaces import held_bytes, with_libraries
from vdnn.units import format_at_least, format_bytes, format_ns
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Encode, Offload, Plan, Recompute
from vdnn.values.result import RunResult
from vdnn.values.trace import Trace

__all__ = ["Planned", "best_plan", "least_plan", "plan_for_budget", "some_plan"]

# Policies that are candidates, too; all that the engine executes on the step as it is.
_CANDIDATES = (
    "vdnn-all",
    "vdnn-conv",
    "vdnn-dyn",
    "recompute",
    "recompute-offload",
    "recompute-blocks",
    "capuchin",
    "encode",
    "encode-offload",
    "checkpoint-offload",
)
# Ops that may be rewritten and simulated for seeds, to make them fit, and in local search; of a long step fewer, whose
# programs take longer.
_SEEDING, _FITTING, _IMPROVING = 250_000, (500_000, 900_000), (800_000, 1_500_000)
# Starts of local search: of a short step more, until their ops are about as many; half as many that need little memory.
_STARTS = range(2, 9)
_STARTING = 2000
# A start so much slower than the bound, as a share, is not looked at alone.
_FAR = 0.3
# The least storage that moves, if nothing else fits: below that a copy's latency is all that it takes.
_SMALL = 1 << 16
# Ways to need little memory of which the allocator is asked what they need.
_LEAST = 8


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan of a step with what the simulator says of it, the bound, and the step without a plan."""

    trace: Trace
    plan: Plan
    result: RunResult
    bound: Bound
    without: RunResult

    @property
    def gap(self) -> float:
        """How much longer than the bound the step is, as a share."""
        return (self.result.iteration_time_ns or 0) / max(self.bound.time_ns, 1) - 1


def plan_for_budget(trace: Trace, hardware: Hardware, budget_bytes: int, options: Options | None = None) -> Plan:
    """The plan for a step that must fit into `budget_bytes` of reserved device memory.

    Raises:
        UsageError: a budget that is not positive, or an option that cannot be.
        InfeasibleError: no plan fits; names the least budget found that does, and what fills it.
    """
    return best_plan(trace, hardware, budget_bytes, options).plan


@without_collecting()
def best_plan(
    trace: Trace,
    hardware: Hardware,
    budget_bytes: int,
    options: Options | None = None,
    *,
    blocks: Trace | None = None,
    seconds: float = 10.0,
) -> Planned:
    """The same, with its prediction and the bound.

    Args:
        blocks: the same step with the model's repeated blocks recomputed (`checkpoint=blocks`), if that may be
            chosen, too; the result says of which step the plan is.
        seconds: that the solver may take for each of its programs; without its answers heuristics decide, and the
            plan's notes say so.

    Raises:
        UsageError: a budget that is not positive, or an option that cannot be.
        InfeasibleError: no plan fits; names the least budget found that does, and what fills it.
    """
    if budget_bytes <= 0:
        raise UsageError(f"a budget of {budget_bytes} bytes holds nothing: give one like 12GiB")
    options = options or Options()
    options.check()
    hardware.check()
    without = simulate_step(trace, None, hardware, memory_limit=budget_bytes)
    if without.fits:
        note = f"the step fits into {format_bytes(budget_bytes)} without offload ({_peak(without)})"
        plan = replace(decide("none", trace, hardware, options), policy="budget", budget_bytes=budget_bytes)
        plan = replace(plan, notes=(note,))
        bound = Bound(without.iteration_time_ns or 0, "the step fits as it is", True, {}, {})
        return Planned(trace, plan, replace(without, policy="budget", plan=plan.fingerprint()), bound, without)
    op_ns = times_with(trace, hardware, {}, "")
    room = max(budget_bytes - held_bytes(trace, hardware), 1)
    bound = time_bound(trace, hardware, op_ns, room, seconds=seconds)
    found: list[tuple[Trace, Plan, RunResult]] = []
    gave_up = False
    for step in (trace, blocks):
        if step is not None:
            # where blocks run again by plan, the model's own checkpoints are one more policy
            runnable = repeated(trace) if step is blocks else []
            planned_blocks = bool(runnable) and all(block.source >= 0 for block in runnable)
            late, pair = _best_of(step, hardware, budget_bytes, options, seconds, not planned_blocks, bound.time_ns)
            gave_up = gave_up or late
            if pair is not None:
                found.append((step, *pair))
    if not found:
        raise _impossible(trace if blocks is None else blocks, hardware, budget_bytes, options)
    step, plan, result = min(found, key=lambda one: (one[2].iteration_time_ns or 0, one[1].offloaded_bytes))
    notes = [_what(step, plan, result, without, budget_bytes), _how_good(result, bound)]
    if gave_up or not bound.solved:
        notes.append(f"the solver gave up after {seconds:g} s: decided by heuristics alone, and the bound is weak")
    plan = replace(plan, policy="budget", budget_bytes=budget_bytes, notes=tuple(notes))
    result = replace(result, policy="budget", plan=plan.fingerprint(), notes=plan.notes)
    return Planned(step, plan, result, bound, without)


def _best_of(
    trace: Trace, hardware: Hardware, budget: int, options: Options, seconds: float, searched: bool, bound_ns: int
) -> tuple[bool, tuple[Plan, RunResult] | None]:
    """The fastest plan found for one step, searched for or of the policies; and whether the solver gave up."""

    def judged(plan: Plan) -> tuple[Plan, RunResult]:
        return plan, simulate_step(trace, plan, hardware, memory_limit=budget)

    none = judged(decide("none", trace, hardware, options))
    if none[1].fits:
        return False, none
    search = Search(trace, hardware, options)
    fitting: list[tuple[Plan, RunResult]] = []
    for plan in _searched(search, budget, seconds, bound_ns) if searched else ():
        pair = judged(plan)
        if pair[1].fits:
            fitting.append(pair)
            break
    for plan in _candidates(trace, hardware, options, budget):
        # most are slower anyway: whether they would fit need not be known
        if not fitting or _time(trace, plan, hardware) < min(one[1].iteration_time_ns or 0 for one in fitting):
            pair = judged(plan)
            if pair[1].fits:
                fitting.append(pair)
    if not fitting and searched:
        search = Search(trace, hardware, replace(options, min_bytes=min(options.min_bytes, _SMALL)))
        fitting = [pair for pair in map(judged, _searched(search, budget, seconds, bound_ns)) if pair[1].fits][:1]
    if not fitting and searched:  # what would be named as the least budget, if that were more
        fitting = [pair for pair in [judged(least_plan(trace, hardware, options).plan)] if pair[1].fits]
    best = min(fitting, key=lambda pair: (pair[1].iteration_time_ns or 0, pair[0].offloaded_bytes), default=None)
    return search.gave_up > 0, best


@without_collecting()
def some_plan(trace: Trace, hardware: Hardware, budget_bytes: int, options: Options | None = None) -> Plan | None:
    """A plan that fits, whatever its time, found in a fraction of the time that the best one takes; None if none is.

    What it finds the search for the best one finds, too.
    """
    options = options or Options()
    search = Search(trace, hardware, options)
    room = max(budget_bytes - held_bytes(trace, hardware), 1)

    def tried() -> Iterator[Plan]:
        yield decide("none", trace, hardware, options)
        yield from _candidates(trace, hardware, options, budget_bytes)
        for found in search.tight(budget_bytes, room):
            yield _plan(search, found)

    for plan in tried():
        step = planned(trace, plan)
        if max(requested(step, resolve(plan, step)), default=0) > budget_bytes:
            continue
        if simulate_step(trace, plan, hardware, memory_limit=budget_bytes).fits:
            return replace(plan, policy="budget", budget_bytes=budget_bytes)
    return None


def _time(trace: Trace, plan: Plan, hardware: Hardware) -> int:
    """The step's time under a plan, without its memory."""
    step = planned(trace, plan)
    return run(step, resolve(plan, step), times_with(step, hardware, {}, ""), hardware).total_ns


def _candidates(trace: Trace, hardware: Hardware, options: Options, budget: int) -> Iterator[Plan]:
    choice = replace(options, rules="event", budget_bytes=budget)
    for name in _CANDIDATES:
        try:
            plan = decide(name, trace, hardware, choice)
        except (UsageError, InfeasibleError):
            continue  # vdnn-dyn says so where nothing of its own fits
        if not any(isinstance(a := e.action, Recompute) and not (a.through or a.block) for e in plan.entries):
            yield plan  # the engine executes it: capuchin's recomputation of single ops it does not


def _searched(search: Search, budget: int, seconds: float, bound_ns: int) -> Iterator[Plan]:
    """Plans of the search, the best first; the last needs the least memory."""
    room = max(budget - held_bytes(search.trace, search.hardware), 1)
    target = room if search.trace.device == "cpu" else room * 15 // 16
    short = len(search.trace.ops) < _STARTING // _STARTS[0]
    count = min(max(_STARTING // max(len(search.trace.ops), 1), _STARTS[0]), _STARTS[-1])
    fitting = search.starts(
        list(search.seeds(target, room, seconds, _SEEDING)), budget, count, _FITTING[len(search.trace.ops) < LONG]
    )
    # what needs little memory has room for changes
    if short or not fitting or min(found.time_ns for found in fitting) > (1 + _FAR) * bound_ns:
        low: dict[Choice, Found] = {}  # the fastest of each choice
        for found in sorted(search.least(), key=lambda found: found.rank):
            if len(low) < max(count // 2, 2) and found.choice not in low and search.fits(found, budget):
                low[found.choice] = found
        fitting += low.values()
    fitting = fitting or list(islice(search.tight(budget, room), 2))
    better, left = [], _IMPROVING[short]
    for place, found in enumerate(sorted(fitting, key=lambda found: found.rank), 1):
        before = search.work
        better.append(Improving(search).improve(found, budget, left // 2 if place < len(fitting) else left))
        left -= search.work - before
    for found in sorted([*better, *fitting], key=lambda found: found.rank):
        yield _plan(search, found)


def _plan(search: Search, found: Found) -> Plan:
    return search.choices.plan(found.choice, found.schedule)


# -- words -----------------------------------------------------------------------------------------


def _what(trace: Trace, plan: Plan, result: RunResult, without: RunResult, budget: int) -> str:
    moved = [entry for entry in plan.entries if isinstance(entry.action, Offload)]
    again = [entry for entry in plan.entries if isinstance(entry.action, Recompute)]
    coded = [entry for entry in plan.entries if isinstance(entry.action, Encode)]
    blocks = recomputed_blocks(trace)
    parts = [f"recomputes {len(blocks)} blocks"] if blocks else []
    if moved:
        nbytes = sum(entry.moved_bytes for entry in moved)
        parts.append(f"offloads {len(moved)} of {len(plan.entries)} saved storages, {format_bytes(nbytes)}")
    if coded:
        nbytes = sum(entry.storage_bytes for entry in coded)
        gone = [entry for entry in coded if entry.moved_bytes]
        parts.append(
            f"keeps codes of {len(coded)}, {format_bytes(nbytes)}"
            + (f", and offloads {len(gone)} of them" if gone else "")
        )
    if again:
        nbytes = sum(entry.storage_bytes for entry in again)
        parts.append(f"computes {len(again)} again, {format_bytes(nbytes)}")
    return (
        f"{', '.join(parts) or 'keeps everything'}, to fit into {format_bytes(budget)}: predicted {_peak(result)}, "
        f"{(result.iteration_time_ns or 0) / max(without.iteration_time_ns or 1, 1):.2f} times the time"
    )


def _how_good(result: RunResult, bound: Bound) -> str:
    time = result.iteration_time_ns or 0
    return (
        f"{format_ns(time)} a step; no plan takes less than {format_ns(bound.time_ns)} here, "
        f"so this one is within {100 * (time / max(bound.time_ns, 1) - 1):.1f} % of the best"
    )


def _peak(result: RunResult) -> str:
    for level in ("reserved", "allocated", "requested"):
        nbytes = getattr(result, f"peak_{level}_bytes")
        if nbytes is not None:
            return f"{format_bytes(nbytes)} {level}"
    return "no peak"


# -- the least budget ------------------------------------------------------------------------------


@without_collecting()
def least_plan(trace: Trace, hardware: Hardware, options: Options | None = None) -> Planned:
    """The plan that fits into the least memory of those known, whatever its time, with that as its budget."""
    options = options or Options()
    tried: list[tuple[int, Plan, Trace, Sequence[Move]]] = []
    for search in (
        Search(trace, hardware, options),
        Search(trace, hardware, replace(options, min_bytes=min(options.min_bytes, _SMALL))),
    ):
        for one in search.least()[:_LEAST]:
            step = search.choices.made(one.choice).step.trace
            tried.append((one.requested_bytes, _plan(search, one), step, one.schedule.moves))
    for plan in _candidates(trace, hardware, options, hardware.available_bytes):
        step = planned(trace, plan)
        trips = resolve(plan, step)
        tried.append((max(requested(step, trips), default=0), plan, step, trips))
    budget, best = 1 << 62, tried[0][1]
    for most, plan, step, moves in sorted(tried, key=lambda one: one[0]):
        if most < budget:
            budget, best = min(
                (budget, best),
                (_least_capacity(with_libraries(step, hardware), moves, most, budget), plan),
                key=lambda one: one[0],
            )
    note = f"needs the least memory of the plans known, {format_bytes(budget)}"
    plan = replace(best, policy="budget", budget_bytes=budget, notes=(note,))
    result = simulate_step(trace, plan, hardware, memory_limit=budget)
    without = simulate_step(trace, None, hardware)
    bound = Bound(without.iteration_time_ns or 0, "the step without a plan", True, {}, {})
    return Planned(trace, plan, result, bound, without)


def _least_capacity(step: Trace, moves: Sequence[Move], most: int, enough: int) -> int:
    """The least device memory in which the allocator's model runs it, to a 256th, or `enough` if it is no less."""
    if step.device == "cpu":
        return most
    low, high = most - 1, min(step_memory(step, moves, 1 << 60).peak_reserved_bytes, enough)
    if high == enough and not fits(step, moves, enough):
        return enough
    while high - low > max(low >> 8, 1 << 20):
        middle = (low + high) // 2
        if fits(step, moves, middle):
            high = middle
        else:
            low = middle
    return high


def _impossible(trace: Trace, hardware: Hardware, budget: int, options: Options) -> InfeasibleError:
    least = least_plan(trace, hardware, options)
    sums: dict[str, int] = {}
    for item in least.result.peak_items:
        sums[item.category] = sums.get(item.category, 0) + item.nbytes
    filling = ", ".join(
        f"{category.replace('_', ' ')} {format_bytes(nbytes)}"
        for category, nbytes in sorted(sums.items(), key=lambda pair: -pair[1])[:4]
    )
    top = ", ".join(f"{i.module} {format_bytes(i.nbytes)}" for i in least.result.peak_items[:3] if i.module)
    return InfeasibleError(
        f"no plan found fits {trace.model} (batch {trace.batch}) into {format_bytes(budget)}: the least is "
        f"{format_at_least(least.plan.budget_bytes or 1)}, at {least.result.peak_at}, filled by {filling}"
        + (f" (largest: {top})" if top else "")
        + "; give that budget, or a smaller batch"
        + (" (more memory may fit worse: other fragments)" if (least.plan.budget_bytes or 0) <= budget else "")
    )
