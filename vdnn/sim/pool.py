"""One pool of device memory as cnmem has it, which vDNN used: sized to the memory there is, at the start.

    malloc   the smallest free block that holds the size, rounded up to 512 bytes; of equal ones the first
    free     joins the block with free neighbours

Nothing is cached by size and nothing is given back: what does not fit into one free block is out of memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from vdnn.analysis.moments import Move
from vdnn.errors import DeviceOutOfMemory
from vdnn.sim.allocator_step import Script
from vdnn.units import format_bytes
from vdnn.values.trace import Trace

__all__ = ["Pool", "PoolRun", "run_pool"]

_GRANULE = 512


class Pool:
    """Free blocks by size and by address."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity - capacity % _GRANULE
        self.used_bytes = 0
        self.peak_bytes = 0
        self._free = [(self.capacity, 0)]  # (size, address), sorted
        self._starts = {0: self.capacity}
        self._ends = {self.capacity: 0}
        self._taken: dict[int, int] = {}

    def malloc(self, nbytes: int) -> int:
        """The address of a block.

        Raises:
            DeviceOutOfMemory: no free block is large enough.
        """
        size = -(-max(nbytes, 1) // _GRANULE) * _GRANULE
        found = bisect_left(self._free, (size, 0))
        if found == len(self._free):
            free = self.capacity - self.used_bytes
            largest = self._free[-1][0] if self._free else 0
            raise DeviceOutOfMemory(
                f"{format_bytes(nbytes)} were asked of a pool of {format_bytes(self.capacity)}, of which "
                f"{format_bytes(free)} are free, {format_bytes(largest)} in one piece"
            )
        block, address = self._free[found]
        self._remove(block, address)
        if block > size:
            self._add(block - size, address + size)
        self._taken[address] = size
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return address

    def free(self, address: int) -> None:
        """Give a block back."""
        size = self._taken.pop(address)
        self.used_bytes -= size
        if address + size in self._starts:
            after = self._starts[address + size]
            self._remove(after, address + size)
            size += after
        if address in self._ends:
            before = self._ends[address]
            self._remove(address - before, before)
            size += address - before
            address = before
        self._add(size, address)

    def _add(self, size: int, address: int) -> None:
        insort(self._free, (size, address))
        self._starts[address] = size
        self._ends[address + size] = address

    def _remove(self, size: int, address: int) -> None:
        del self._free[bisect_left(self._free, (size, address))]
        del self._starts[address]
        del self._ends[address + size]


@dataclass(frozen=True, slots=True)
class PoolRun:
    """What a pool made of a step; `failed_at` is the position at which memory ran out (-1: before the step)."""

    peak_bytes: int
    failed_at: int | None
    failure: str


def run_pool(trace: Trace, moves: Sequence[Move], capacity: int) -> PoolRun:
    """Run a step's allocations through one pool of that many bytes."""
    script = Script.of(trace, moves)
    pool = Pool(capacity)
    addresses: dict[int, int] = {}
    for piece, position in zip(script.calls, script.positions, strict=True):
        try:
            if piece >= 0:
                addresses[piece] = pool.malloc(script.sizes[piece])
            else:
                pool.free(addresses.pop(~piece))
        except DeviceOutOfMemory as error:
            return PoolRun(pool.peak_bytes, position, str(error))
    return PoolRun(pool.peak_bytes, None, "")
