"""The largest batch that fits: found with few captures, because memory grows almost linearly with the batch.

Two small batches give a line; where it meets the memory is the first guess, and mostly a good one: from there a small
step, then larger ones, until one fits and one does not, then bisection. The simulator is the judge of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vdnn.choosing import BUDGET, choose_plan, policy_options
from vdnn.errors import CaptureError, InfeasibleError
from vdnn.units import format_bytes
from vdnn.values import Hardware, Plan, RunResult, Trace

__all__ = ["Asked", "fitting", "largest_batch", "max_batch_of"]

# What fits under these policies, fits under that one, which chooses among their plans, too.
_INCLUDED = {"vdnn-dyn": ("vdnn-conv", "vdnn-all"), BUDGET: ("vdnn-all",)}

# Larger batches are sought in steps of this share: nobody runs a batch of 1237.
_GRAIN = 32
_FIRST = 8
# Steps away from the guess, in eighths of the batch, after a first one of the grain; the last again and again.
_STEPS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Asked:
    """Of which model, trained how and on what, the largest batch is asked for; `api.max_batch` says what each is."""

    model: str
    model_options: Mapping[str, object]
    machine: Hardware
    memory_bytes: int
    precision: str
    optimizer: str
    options: Mapping[str, Any]
    limit: int
    traces: dict[Any, Trace]
    cached: bool

    def trace(self, batch: int) -> Trace:
        """The step at a batch, captured once."""
        from vdnn import trace_cache
        from vdnn.models import load
        from vdnn.tracing import capture_work

        how: dict[str, Any] = {"precision": self.precision, "optimizer": self.optimizer}
        key = (self.model, batch, tuple(sorted(self.model_options.items())), self.precision, self.optimizer)
        if key not in self.traces:
            kept = None
            if self.cached:
                kept = trace_cache.key_of(self.model, str(batch), self.model_options, device="cuda", **how)
            trace = trace_cache.known(kept)
            if trace is None:
                trace = capture_work(load(self.model, batch, **self.model_options), **how)
                trace_cache.keep(kept, trace)
            self.traces[key] = trace
        return self.traces[key]

    def step(self, batch: int, decide: Callable[[Trace], Plan]) -> RunResult:
        """The step at a batch under a plan."""
        from vdnn.sim import simulate_step

        trace = self.trace(batch)
        return simulate_step(trace, decide(trace), self.machine, memory_limit=self.memory_bytes)


def fitting(policy: str, batches: Mapping[str, int]) -> int:
    """A batch that fits under a policy, from the largest ones of others; 0 if they do not tell."""
    included = _INCLUDED.get(policy, ())
    return max((batches[name] for name in included), default=0) if {*included} <= {*batches} else 0


def max_batch_of(asked: Asked, policy: str, start: int = 0) -> tuple[RunResult, RunResult | None]:
    """The largest batch that fits under a policy, and the next larger one that was tried and does not.

    For the planner's row plans are sketched, whatever their time; the best one is made for the largest batch alone.

    Raises:
        UsageError: an unknown name or option.
        InfeasibleError: a batch of 1 does not fit.
    """
    from vdnn.planner import BUDGETED, some_plan

    there = asked.memory_bytes
    budget = there if policy in (BUDGET, *BUDGETED) else None

    def decided(trace: Trace) -> Plan:
        return choose_plan(trace, asked.machine, policy, budget, dict(asked.options))

    def sketched(trace: Trace) -> Plan:
        found = some_plan(trace, asked.machine, there, policy_options(dict(asked.options)))
        if found is None:
            raise InfeasibleError(f"no plan found fits {trace.model} (batch {trace.batch}) into {format_bytes(there)}")
        return found

    def search(decide: Callable[[Trace], Plan], limit: int) -> tuple[RunResult, RunResult | None]:
        return largest_batch(lambda batch: asked.step(batch, decide), there, limit=limit, start=start)

    for name in () if start else _INCLUDED.get(policy, ()):
        with contextlib.suppress(InfeasibleError):
            start = max(start, max_batch_of(asked, name)[0].batch)
    if policy != BUDGET:
        return search(decided, asked.limit)
    try:
        sketch, above = search(sketched, asked.limit)
    except InfeasibleError:
        return search(decided, 2)  # which says what it would take
    return asked.step(sketch.batch, decided), above


def largest_batch(
    simulated: Callable[[int], RunResult], memory_bytes: int, *, limit: int = 1 << 16, start: int = 0
) -> tuple[RunResult, RunResult | None]:
    """The result at the largest batch that fits, and at the next larger one that was tried and does not.

    Args:
        simulated: the result of a step at a batch; `fits` decides. It raises `InfeasibleError` where there is no plan
            with which that batch fits; such a batch has no result.
        memory_bytes: what the peaks are compared with when a batch is guessed.
        start: a batch that should fit, if one is known: it is tried first.
        limit: no larger batch is tried; the second result is None if this one fits, or the next one has no plan.

    Raises:
        InfeasibleError: a batch of 1 does not fit, or the smallest that the model can run.
        CaptureError: the model cannot be captured.
    """
    known: dict[int, RunResult] = {}
    impossible: dict[int, InfeasibleError] = {}

    def fits(batch: int) -> bool:
        if batch not in known and batch not in impossible:
            try:
                known[batch] = simulated(batch)
            except InfeasibleError as error:
                impossible[batch] = error
            except CaptureError:
                if batch > min((*known, *impossible), default=0):
                    raise
                return False  # a larger one ran: this one is too small for the model (batch norm of one value)
        return batch in known and bool(known[batch].fits)

    low, high = 0, limit + 1  # `low` fits (0 always), `high` does not
    batch = min(start or _FIRST, limit)
    guessed, between = bool(start), False  # `between`: since the guess one fitted, and one did not
    steps = [0, *_STEPS]
    first: bool | None = None
    while high - low > (_grain(low) if high <= limit else 1):
        does = fits(batch)
        low, high = (batch, high) if does else (low, batch)
        if not guessed and high > limit:  # small batches, until there are two for a line
            guessed = len(known) == 2
            batch = min(max(_meets(known, memory_bytes), low + 1) if guessed else 4 * low, limit)
            continue
        first = does if first is None else first
        between = between or not guessed or does is not first
        away = max(_grain(batch - _grain(batch)), batch * (steps.pop(0) if len(steps) > 1 else steps[0]) // 8)
        batch = batch + away if does else batch - away
        if between or not low < batch < high:
            batch = (low + high) // 2 if high <= limit or high - low > _grain(low) else limit
    if low == 0:
        least = min((*known, *impossible))
        if least in impossible:
            raise impossible[least]
        one = known[least]
        smallest = "" if one.batch == 1 else ", the smallest that the model runs"
        raise InfeasibleError(
            f"{one.model} does not fit on {one.gpu} under {one.policy} even with a batch of {one.batch}{smallest}: its "
            f"peak is {format_bytes(_peak(one))} of {format_bytes(memory_bytes)}; take another policy, or a larger GPU"
        )
    return known[low], known.get(high)


def _grain(batch: int) -> int:
    return max(1, batch // _GRAIN)


def _peak(result: RunResult) -> int:
    """What grows with the batch: near its limit the allocator gives segments back, so reserved memory does not."""
    return result.peak_allocated_bytes or result.peak_requested_bytes or 0


def _meets(known: dict[int, RunResult], memory_bytes: int) -> int:
    """Where the line through two peaks meets the memory."""
    (one, two) = sorted(known)
    slope = (_peak(known[two]) - _peak(known[one])) / (two - one)
    return int(one + (memory_bytes - _peak(known[one])) / slope) if slope > 0 else 4 * two
