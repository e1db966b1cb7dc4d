"""Pinned host memory of a step that takes it tensor by tensor from torch's own allocator (`vdnn.sim.host_allocator`).

The step is played twice, because blocks that the first one leaves in the cache serve the second. Within a step no copy
is known to be over (the host runs ahead, and torch asks only when it wants memory), at its end all are.
"""

from __future__ import annotations

from collections.abc import Sequence

from vdnn.analysis.moments import Move
from vdnn.sim.host_allocator import HostAllocator

__all__ = ["pinned_bytes"]


def pinned_bytes(moves: Sequence[Move]) -> int:
    """The most that is pinned at once, with what rounding to powers of two adds."""
    allocator = HostAllocator()
    events: list[tuple[int, int, int]] = []  # at one position what dies goes first
    for i, move in enumerate(moves):
        if move.nbytes:
            events += [(move.out[0], 1, i), (move.host_until, 0, i)]
    events.sort()
    for _ in range(2):
        addresses: dict[int, int] = {}
        for _, born, i in events:
            if born:
                addresses[i] = allocator.allocate(moves[i].nbytes)
                allocator.record_event(addresses[i], 0)
            else:
                allocator.free(addresses[i])
        allocator.finish(0)
    return allocator.statistics.allocated_bytes_peak
