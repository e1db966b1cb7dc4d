"""Blocks, and the sets of free ones. A segment is a list of blocks, linked in order of address.

A set of free blocks belongs to one stream and one pool and is ordered by (size, age of the segment, address). It is
a sorted list of whole numbers, `size << 96 | number of the segment << 57 | address`, so that the best fit is one
bisection and comparing costs little.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from vdnn.sim.allocator.statistics import PoolStatistics

__all__ = ["ADDRESS", "ALLOCATED", "AWAITING", "FREE", "KEY", "UNMAPPED", "Block", "Pool", "Region", "Shelf", "Shelves"]

# The states of a block. AWAITING: freed, but another stream has not passed its last use yet.
FREE, ALLOCATED, AWAITING, UNMAPPED = range(4)
ADDRESS = 57  # bits of an address in a key: no device address is as large
KEY = 96  # bits below the size


class Pool:
    """Small or large blocks, of the default pool (0, 0) or of a private one; `calls` counts searches, for their age."""

    __slots__ = ("calls", "id", "shelves", "small", "statistics")

    def __init__(self, small: bool, id: tuple[int, int]) -> None:
        self.small = small
        self.id = id
        self.statistics = PoolStatistics()
        self.calls = 0
        self.shelves = Shelves(self)


class Shelf:
    """The free blocks of one stream in one pool, and, with expandable segments, the parts not mapped yet."""

    __slots__ = ("by_key", "keys", "pool", "regions", "small", "statistics", "stream", "unmapped")

    def __init__(self, pool: Pool, stream: int) -> None:
        self.pool = pool
        self.small = pool.small
        self.statistics = pool.statistics
        self.stream = stream
        self.keys: list[int] = []
        self.by_key: dict[int, Block] = {}
        self.unmapped: list[Block] = []  # by address
        self.regions: list[Region] = []

    def put(self, block: Block) -> None:
        """Add a free block, of no age."""
        block.state = FREE
        block.born = self.pool.calls
        key = block.size << KEY | block.order + block.addr
        insort(self.keys, key)
        self.by_key[key] = block

    def take(self, block: Block) -> None:
        """Remove a free block."""
        key = block.size << KEY | block.order + block.addr
        del self.keys[bisect_left(self.keys, key)]
        del self.by_key[key]

    def free_blocks(self) -> list[Block]:
        """In the order in which they are found."""
        return [self.by_key[key] for key in self.keys]


class Shelves(dict[int, Shelf]):
    """Stream → shelf; a stream that is new gets one."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool

    def __missing__(self, stream: int) -> Shelf:
        shelf = self[stream] = Shelf(self._pool, stream)
        return shelf

    def in_order(self) -> list[Shelf]:
        """By stream."""
        return [self[stream] for stream in sorted(self)]


class Block:
    """A stretch of a segment. `uses`: the other streams that used it; `events`: of how many the end is awaited.

    `order` is the number of its segment, counted from the first that was made, in the place it has in a key.
    """

    __slots__ = ("addr", "born", "events", "next", "order", "prev", "requested", "shelf", "size", "state", "uses")

    def __init__(
        self, addr: int, size: int, shelf: Shelf, prev: Block | None, next: Block | None, state: int, order: int
    ) -> None:
        self.addr = addr
        self.size = size
        self.shelf = shelf
        self.prev = prev
        self.next = next
        self.state = state
        self.order = order
        self.requested = 0
        self.uses: list[int] | None = None

    # `born` (for garbage collection) and `events` (for other streams) are set where they are first needed.
    born: int
    events: int

    def __repr__(self) -> str:
        return f"Block({self.addr:#x}, {self.size}, {('free', 'allocated', 'awaiting', 'unmapped')[self.state]})"


class Region:
    """A stretch of addresses that an expandable segment may fill, `page` bytes at a time."""

    __slots__ = ("addr", "page", "size")

    def __init__(self, addr: int, size: int, page: int) -> None:
        self.addr = addr
        self.size = size
        self.page = page
