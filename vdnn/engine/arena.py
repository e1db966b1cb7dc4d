"""`Arena`: one piece of host memory, laid out from a plan, where every storage that the plan moves has its place.

    lay_out(schedule)      the slab is cut for this plan; a larger one is pinned where it is too small
    take(entry, nbytes)    the entry's block

Every storage that a plan moves leaves in forward and is needed in backward: at the turn between the two all of them are
on the host, and no two could share a place. So they lie one behind the other, and the slab is their sum, to the byte
but for alignment. The plans of one model (one for each input shape) use the same slab in turn, as large as
the largest needs. A block that is still in use (two forwards before their backwards) is not given again: the pool
has others.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence

from vdnn.engine.device import Event, HostBlock, Slab
from vdnn.engine.hostpool import HostPool
from vdnn.engine.schedule import Schedule

__all__ = ["Arena"]

_ALIGNMENT = 64  # a cache line; whole elements of every dtype

_Homes = dict[int, deque[HostBlock]]  # the free blocks of each entry of a plan


class Arena:
    """The place of each storage of one plan at a time.

    Args:
        note: told of each new block, before it is used.
    """

    def __init__(self, pool: HostPool, note: Callable[[HostBlock], None] | None = None) -> None:
        self._pool = pool
        self._note = note
        self._slab: Slab | None = None
        self._laid: Schedule | None = None
        self._homes: _Homes = {}
        self._cuts: weakref.WeakKeyDictionary[Schedule, _Homes] = weakref.WeakKeyDictionary()
        self._pending: list[Event] = []
        self._refused_bytes: int | None = None  # so many were not to be had

    def lay_out(self, schedule: Schedule) -> Sequence[Event] | None:
        """Cut the slab for a plan. None where that cannot be now: blocks of another are in use, or there is no memory.

        Returns: what the offload stream has to wait for before it writes there; then `settled()`.
        """
        with self._pool.lock:
            self._pool.collect()
            if schedule is self._laid and self._slab is not None and not self._slab.spoiled:
                return self._pending
            new = self._cut(schedule)
            if new is None:
                return None
            pending = self._pending
        if self._note is not None:
            for block in new:
                self._note(block)
        return pending

    def settled(self) -> None:
        """The offload stream waits for what `lay_out` returned."""
        with self._pool.lock:
            self._pending = []

    def take(self, entry: int, nbytes: int) -> HostBlock | None:
        """The block of an entry of the plan, None where it is in use or too small."""
        with self._pool.lock:
            if not self._homes.get(entry):
                self._pool.collect()
            for _ in range(len(self._homes.get(entry, ()))):
                block = self._homes[entry].popleft()
                if block.data.numel() >= nbytes:
                    return self._pool.hand_out(block, nbytes)
                self._homes[entry].append(block)
        return None

    def _cut(self, schedule: Schedule) -> list[HostBlock] | None:
        """Blocks for a plan, those that are new; None where there can be none."""
        if self._slab is not None and self._slab.spoiled:
            self._let_go()  # nobody knows when the copy to its lost bytes is over; whoever has blocks of it keeps it
        if self._laid is not None and sum(map(len, self._homes.values())) < self._laid.host_blocks:
            return None
        sizes = {entry: [_aligned(n) for n in found] for entry, found in schedule.host_sizes.items()}
        total = sum(map(sum, sizes.values()))
        if self._slab is None or self._slab.data.numel() < total:
            if self._refused_bytes is not None and total >= self._refused_bytes:
                return None
            self._let_go()
            self._slab = self._pool.slab(total)
            if self._slab is None:
                self._refused_bytes = total
                return None
        busy = (block.busy for home in self._homes.values() for block in home)
        self._pending += [event for event in busy if event is not None]
        new: list[HostBlock] = []
        homes = self._cuts.get(schedule)
        if homes is None:
            homes, first = {}, 0
            for entry, found in sizes.items():
                home = homes[entry] = deque()
                for size in found:
                    home.append(HostBlock(self._slab, first, size, home))
                    first += size
                new += home
            self._cuts[schedule] = homes
        self._homes, self._laid = homes, schedule
        return new

    def _let_go(self) -> None:
        self._slab = self._laid = None
        self._homes = {}
        self._cuts.clear()
        self._pending = []
        self._pool.collect()


def _aligned(nbytes: int) -> int:
    return -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
