"""A recorded history played through the model of the allocator, event by event, until the first difference.

The record gives what the model cannot know: the requests, the addresses of new segments, that CUDA had no memory,
that another stream was done, that somebody emptied the cache. Everything else is the model's own: which block, which
address, when a segment is taken and how large, what is given back and in which order, what is split and joined.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from vdnn.errors import DeviceOutOfMemory
from vdnn.sim.allocator.blocks import KEY, Block, Shelf
from vdnn.sim.allocator.caching import CachingAllocator
from vdnn.sim.allocator.options import SMALL_MOST, AllocatorOptions
from vdnn.sim.allocator.releasing import whole_pages
from vdnn.snapshots import EventRecord

__all__ = ["Difference", "Follower"]

_ELSEWHERE = -1  # a stream that no record names: the one that a block waits for
_TAKEN = ("segment_alloc", "segment_map")
_GIVEN = ("segment_free", "segment_unmap")
_SKIPPED = ("user_defined", "annotate")
_SOME_TIB = 1 << 42  # how much address space an expandable segment may fill, where the device is not known


@dataclass(eq=False)
class Difference(Exception):
    """The first place where the model and the record part; `event` is -1 for the state at the end."""

    event: int
    what: str
    recorded: str
    modelled: str


class Follower(CachingAllocator):
    """An allocator whose device is the record, and that checks every event of its own against the next one there."""

    def __init__(self, events: Sequence[EventRecord], options: AllocatorOptions) -> None:
        super().__init__(None, options)
        self.driver = _Record(self)
        self.events = events
        self.at = 0
        self.history = []  # so that events are told; none is kept
        self.collections = self.ties = 0
        self._plain_search = False  # every search goes through `fitting`

    # -- the record ----------------------------------------------------------------------------------

    def next(self) -> EventRecord | None:
        """The next event that says something about memory."""
        while self.at < len(self.events) and self.events[self.at].action in _SKIPPED:
            self.at += 1
        return self.events[self.at] if self.at < len(self.events) else None

    def record(self, action: str, addr: int, size: int, shelf: Shelf) -> None:
        """What the model does must be what is recorded next."""
        e = self.next()
        own = EventRecord(action, addr, size, shelf.stream, shelf.pool.id)
        if e is None or (e.action, e.addr, e.size, e.stream) != own[:4]:
            raise Difference(self.at, "the next event", told(e), told(own))
        self.at += 1

    def expects(self, wanted: str) -> Difference:
        """The model needs something that is not recorded."""
        return Difference(self.at, "the next event", told(self.next()), wanted)

    # -- one step ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Follow the record by one call of the program; False at its end.

        Raises:
            Difference: here the model does something else.
        """
        e = self.next()
        if e is None:
            return False
        if e.action == "snapshot":
            if e.size != self.total.active_bytes:
                raise Difference(self.at, "active bytes at a snapshot", str(e.size), str(self.total.active_bytes))
            self.at += 1
        elif e.action == "free_requested":
            self._free(e)
        elif e.action == "alloc":
            self._malloc(e)
        else:
            self._request(e)
        return True

    def _free(self, e: EventRecord) -> None:
        if e.addr not in self.live:
            raise Difference(self.at, "a block is freed", told(e), f"nothing is allocated at {e.addr:#x}")
        following = self.events[self.at + 1] if self.at + 1 < len(self.events) else None
        if following is None or (following.action, following.addr) != ("free_completed", e.addr):
            self.record_stream(e.addr, _ELSEWHERE)  # its end is recorded later, or not at all
        self.free(e.addr)
        self._queues.clear()  # the record says when it is over

    def _request(self, e: EventRecord) -> None:
        request = self._upcoming()
        if request is None:
            self._between(e)
            return
        rounded = self.options.rounded(max(request.size, 1))
        shelf = self.pools[request.pool][rounded > SMALL_MOST].shelves[request.stream]
        found = self.fitting(shelf, rounded)
        polled = False
        while (first := self.next()) is not None and first.action == "free_completed":
            self.completed(first)
            polled = True
        here = self.next()
        assert here is not None
        if here.action in (*_GIVEN, *_TAKEN) and polled and found is None and self.fitting(shelf, rounded):
            # torch waited for those blocks after it had searched, so the request does not get them
            block = self.grow(shelf, rounded)
            if block is None:
                raise self.expects("out of memory")
            self.place(block, rounded, request.size)
        elif here.action in _GIVEN and (found is not None or self._given() == self._releasable()):
            # not for this request, or not only: then it makes no difference
            self._between(here)
        else:
            self._malloc(request)

    def _given(self) -> list[tuple[int, int]]:
        """Address and size of what is given back from here on in the record."""
        found = []
        for e in self.events[self.at :]:
            if e.action not in _GIVEN:
                break
            found.append((e.addr, e.size))
        return found

    def _releasable(self) -> list[tuple[int, int]]:
        """What emptying the cache would give back, in order."""
        found = []
        for pool in reversed(self.pools[0, 0]):
            for shelf in pool.shelves.in_order():
                for block in shelf.free_blocks():
                    if self._expandable:
                        start, stop = whole_pages(block)
                        if start < stop:
                            found.append((start, stop - start))
                    elif block.prev is None and block.next is None:
                        found.append((block.addr, block.size))
        return found

    def _malloc(self, request: EventRecord) -> None:
        try:
            self.malloc(request.size, request.stream, request.pool)
        except DeviceOutOfMemory:
            assert request.action == "oom", "what is told was compared with the record"

    def _upcoming(self) -> EventRecord | None:
        """The request that the events from here on belong to; None: they belong to none."""
        for i in range(self.at, len(self.events)):
            e = self.events[i]
            if e.action in ("alloc", "oom"):
                return e
            if e.action not in (*_GIVEN, *_TAKEN, *_SKIPPED, "free_completed"):
                return None
        return None

    def _between(self, e: EventRecord) -> None:
        """Nobody asked for memory: a block's end was noticed, or the cache was emptied."""
        if e.action == "free_completed":
            self.completed(e)
        elif e.action in _GIVEN:
            before = self.at
            self.release_cached()
            if self.at == before:
                raise self.expects("nothing that could be given back")
        else:
            raise self.expects("no new segment: nothing was asked for")

    def completed(self, e: EventRecord) -> None:
        """A block's other streams are done."""
        block = self.awaiting.get(e.addr)
        if block is None:
            raise Difference(self.at, "a block becomes free", told(e), f"no block waits at {e.addr:#x}")
        self.finish_block(block)

    # -- where the record decides --------------------------------------------------------------------

    def fitting(self, shelf: Shelf, rounded: int) -> Block | None:
        """Of blocks of equal size, the recorded one.

        The oldest segment's would be taken, but each thread numbers its own, and of some the making is not recorded.
        """
        block = super().fitting(shelf, rounded)
        e = self.next()
        if block is None or e is None or e.action != "alloc" or e.addr == block.addr:
            return block
        i = bisect_left(shelf.keys, block.size << KEY)
        while i < len(shelf.keys) and shelf.keys[i] >> KEY == block.size:
            other = shelf.by_key[shelf.keys[i]]
            if other.addr == e.addr:
                self.ties += 1
                return other
            i += 1
        return block

    def grow(self, shelf: Shelf, rounded: int) -> Block | None:
        """Collect the garbage that was collected: how much the process may take is not recorded."""
        if self.options.garbage_collection_threshold > 0:
            self._collect_recorded()
        return super().grow(shelf, rounded)

    def _collect_recorded(self) -> None:
        given, releasable = self._given(), self._releasable()
        large = {b.addr: b for shelf in self.pools[0, 0][1].shelves.values() for b in shelf.free_blocks()}
        if given and given != releasable and all(g in releasable and g[0] in large for g in given):
            for addr, _ in given:
                self.release(large[addr])
            self.collections += 1

    def release_cached(self) -> None:
        """Other streams' blocks in the order of the record; private pools as it says."""
        while (e := self.next()) is not None and e.action == "free_completed":
            self.completed(e)
        super().release_cached()
        while (e := self.next()) is not None and e.action == "segment_free" and e.pool != (0, 0):
            blocks = [
                b for pool in self.pools[e.pool] for b in pool.shelves[e.stream].free_blocks() if b.addr == e.addr
            ]
            if not blocks or blocks[0].prev is not None or blocks[0].next is not None:
                raise self.expects("no such segment in that private pool")
            self.release(blocks[0])


class _Record:
    """The device that the record tells of."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def allocate(self, size: int, stream: int, small: bool) -> int | None:
        e = self._next(f"a new segment of {size} bytes")
        if e is None:
            return None
        if (e.action, e.size, e.stream) != ("segment_alloc", size, stream):
            raise self._follower.expects(f"segment_alloc of {size} bytes on stream {stream}")
        return e.addr

    def map(self, addr: int, size: int) -> bool:
        e = self._next(f"{size} bytes mapped at {addr:#x}")
        if e is None:
            return False
        if (e.action, e.addr, e.size) != ("segment_map", addr, size):
            raise self._follower.expects(f"segment_map of {size} bytes at {addr:#x}")
        return True

    def reserve(self, size: int, stream: int, small: bool) -> int:
        """Where the next pages are mapped, if need be after others were given back."""
        follower = self._follower
        for e in follower.events[follower.at :]:
            if e.action == "segment_map" and e.stream == stream:
                return e.addr
            if e.action in ("alloc", "oom"):
                break
        return 1 << 56

    def _next(self, wanted: str) -> EventRecord | None:
        """The recorded segment; None if CUDA had no memory, so that some is given back or the request fails."""
        e = self._follower.next()
        if e is not None and (e.action in _GIVEN or e.action in ("oom", "free_completed")):
            return None
        if e is None or e.action not in _TAKEN:
            raise self._follower.expects(wanted)
        return e

    def release(self, addr: int, size: int) -> None: ...

    def unreserve(self, addr: int, size: int) -> None: ...

    def unmap(self, addr: int, size: int) -> None: ...

    def total_bytes(self) -> int:
        return _SOME_TIB

    def free_bytes(self) -> int:
        e = self._follower.next()
        return e.addr if e is not None and e.action == "oom" else 0


def told(e: EventRecord | None) -> str:
    """An event for people."""
    if e is None:
        return "the end of the record"
    if e.action == "oom":
        return f"oom: {e.size} bytes on stream {e.stream}"
    return f"{e.action} of {e.size} bytes at {e.addr:#x} on stream {e.stream}"
