"""Where the gap between a plan and the bound comes from: bounds that know more and more of what the plan decided.

    bound        no plan is faster at this budget
    fragments    + what the allocator takes, and the libraries' workspaces: the bound at the bytes that the plan's step
                 requests at its peak
    again        + what is computed again: the bound of the step with the plan's blocks, chains and codes as they are,
                 of which anything may be offloaded in any part
    storages     + what is offloaded: the same, if just what the plan offloads goes, and goes whole
    copies       + when: the step as simulated, where copies start at program points, have a latency, and are waited for

Each is no less than the one before, for it allows less; so the differences are the parts of the gap, and sum to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vdnn.analysis.encoding import planned
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import resolve
from vdnn.costs import times_with
from vdnn.planner.bound import pieces, time_bound
from vdnn.planner.budget import Planned
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Trace

__all__ = ["GapParts", "gap_parts"]


@dataclass(frozen=True, slots=True)
class GapParts:
    """The parts of the time that a plan takes over the bound, in ns."""

    fragments_ns: int
    again_ns: int
    storages_ns: int
    copies_ns: int

    @property
    def total_ns(self) -> int:
        """The gap."""
        return self.fragments_ns + self.again_ns + self.storages_ns + self.copies_ns


def gap_parts(found: Planned, trace: Trace, hardware: Hardware, *, seconds: float = 20.0) -> GapParts:
    """The parts of this plan's gap; `trace` is the step that was to be planned, on which the bound is.

    A program that is not solved in `seconds` adds nothing: its part is then the next one's.
    """
    end = found.result.iteration_time_ns or 0
    step = planned(found.trace, found.plan)
    moves = resolve(found.plan, step)
    gone = {move.storage for move in moves}
    room = max(max(requested(step, moves), default=0), 1)
    left = [replace(piece, again=None) for piece in pieces(step)]
    whole = [piece for piece in left if piece.storage in gone]
    op_ns, again_ns = (times_with(one, hardware, {}, "") for one in (trace, step))
    bounds = [
        found.bound,
        time_bound(trace, hardware, op_ns, room, seconds=seconds),
        time_bound(step, hardware, again_ns, room, items=left, seconds=seconds),
        time_bound(step, hardware, again_ns, room, items=whole, seconds=seconds, forced=True),
    ]
    times: list[int] = []
    for bound in bounds:
        times.append(min(max([bound.time_ns, *times]), end))
    fragments, again, storages, copies = (
        later - sooner for sooner, later in zip(times, [*times[1:], end], strict=True)
    )
    return GapParts(fragments, again, storages, copies)
