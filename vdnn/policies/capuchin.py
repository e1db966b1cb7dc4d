"""Capuchin (Peng et al., ASPLOS 2020): for each feature map swapping or recomputation, whichever costs less.

    free time   of a swap: from its last use in forward to its use in backward, less both copies
    MSPS        of a recomputation: memory saved per second of computing it again

Only what it takes for the step to fit: first swaps that cost nothing, by free time; then, by memory saved per
second lost, the cheaper of a swap that must be waited for and a recomputation. Times are bounds from peak rates. The
original measures its accesses in a first iteration, and copies as soon as a tensor's last use is over; here a plan
does that by event rules. A plan that recomputes is simulated only.
"""

from __future__ import annotations

from vdnn.analysis.chains import makers
from vdnn.analysis.liveness import peak
from vdnn.analysis.moments import resolve
from vdnn.analysis.recomputing import makeable, recomputed, regenerators
from vdnn.policies.candidates import Saved, survey
from vdnn.policies.event_rules import event_actions, least_clock
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Offload, Plan, Recompute
from vdnn.values.trace import Trace

__all__ = ["capuchin"]

_ROUNDS = 12


@register("capuchin")
def capuchin(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Swaps and recomputes as much as it takes to fit into the budget, or the machine's memory."""
    budget = options.budget_bytes or hardware.available_bytes
    items = {item.storage: item for item in survey(trace, options)}
    ranked = _ranked(trace, hardware, [item for item in items.values() if item.movable])
    wanted = peak(trace).nbytes - budget
    plan = _plan(trace, options, items, [], budget)
    for _ in range(_ROUNDS):
        if wanted <= 0:
            return plan
        taken, saving = [], 0
        for item, again in ranked:
            if saving >= wanted:
                break
            taken.append((item, again))
            saving += item.nbytes
        plan = _plan(trace, options, items, taken, budget)
        step = recomputed(trace, plan)
        over = peak(step, resolve(plan, step)).nbytes - budget
        if over <= 0 or len(taken) == len(ranked):
            return plan
        wanted = saving + over  # what was chosen lies elsewhere than the peak: choose more
    return plan


def _ranked(trace: Trace, hardware: Hardware, items: list[Saved]) -> list[tuple[Saved, bool]]:
    """The feature maps in the order in which they are taken, and whether by recomputation."""
    clock, made = least_clock(trace, hardware), makers(trace)
    free: list[tuple[int, Saved, bool]] = []
    dear: list[tuple[float, Saved, bool]] = []
    for item in items:
        out = hardware.link_latency_ns + item.nbytes * 10**9 // hardware.d2h_bytes_per_s
        back = hardware.link_latency_ns + item.nbytes * 10**9 // hardware.h2d_bytes_per_s
        last = max(trace.saved[i].packed_at for i in item.tensors)
        free_time = clock[trace.storages[item.storage].need] - clock[last] - out - back
        if free_time >= 0:
            free.append((free_time, item, False))
            continue
        ops = regenerators(trace, item.storage, made)
        again = sum(clock[i + 1] - clock[i] for i in ops) if ops is not None else None
        cheaper = again is not None and again < -free_time
        lost = again if cheaper and again is not None else -free_time
        dear.append((item.nbytes / max(lost, 1), item, cheaper))
    free.sort(key=lambda entry: (-entry[0], entry[1].storage))
    dear.sort(key=lambda entry: (-entry[0], entry[1].storage))
    return [(item, again) for _, item, again in (*free, *dear)]


def _plan(
    trace: Trace, options: Options, items: dict[int, Saved], taken: list[tuple[Saved, bool]], budget: int
) -> Plan:
    order = {storage: i for i, storage in enumerate(items)}
    swaps = sorted((item for item, again in taken if not again), key=lambda item: order[item.storage])
    offloads, inflight = event_actions(trace, swaps, options)
    actions: dict[int, Offload | Recompute] = dict(offloads)
    possible = makeable(trace, [item.storage for item, again in taken if again], [item.storage for item in swaps])
    dropped = [item for item, again in taken if again and item.storage in possible]
    actions.update({item.storage: Recompute("computing it again costs less than waiting") for item in dropped})
    kept = {item.storage: item.why or "the budget does not ask for it" for item in items.values()}
    note = (
        f"for {format_bytes(budget)}: swaps {format_bytes(sum(i.nbytes for i in swaps))} in {len(swaps)} storages, "
        f"recomputes {format_bytes(sum(i.nbytes for i in dropped))} in {len(dropped)}"
    )
    return make_plan("capuchin", trace, options, actions, kept, inflight, (note,))
