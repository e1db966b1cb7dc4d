"""Segments: taking them from the device and giving them back. The lower half of the allocator."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from vdnn.sim.allocator.blocks import ADDRESS, ALLOCATED, FREE, KEY, UNMAPPED, Block, Pool, Region, Shelf
from vdnn.sim.allocator.driver import Driver
from vdnn.sim.allocator.options import SMALL_SEGMENT, AllocatorOptions
from vdnn.sim.allocator.statistics import PoolStatistics

__all__ = ["Event", "Pools", "Releasing", "whole_pages"]

# action, address (out of memory: the device's free bytes), size, stream, context, pool
Event = tuple[str, int, int, int, str, tuple[int, int]]


class Pools(dict[tuple[int, int], tuple[Pool, Pool]]):
    """Pool id → its small and its large blocks; a pool that is new gets them."""

    def __missing__(self, id: tuple[int, int]) -> tuple[Pool, Pool]:
        pair = self[id] = (Pool(True, id), Pool(False, id))
        return pair


class Releasing:
    """What the allocator holds, and how segments come and go."""

    def __init__(self, driver: Driver, options: AllocatorOptions, allowed_bytes: int | None) -> None:
        options.check()
        self.driver = driver
        self.options = options
        self.allowed_bytes = allowed_bytes
        self.pools = Pools()
        self.live: dict[int, Block] = {}
        self.awaiting: dict[int, Block] = {}
        self.total = PoolStatistics()
        self.num_alloc_retries = self.num_ooms = self.num_sync_all_streams = 0
        self.num_device_alloc = self.num_device_free = 0
        self.oversize_allocations = self.oversize_segments = 0
        self.history: list[Event] | None = None
        self.context = ""
        self._segments_made = 0
        self._expandable = options.expandable_segments
        self._collects = allowed_bytes is not None and options.garbage_collection_threshold > 0
        self._queues: dict[int, deque[Block]] = {}  # stream → blocks that wait for an event of it
        self._done: dict[int, int] = {}  # stream → how many of them are past

    def new_order(self) -> int:
        """The place in the order of free blocks for those of a new segment: after all that were made before."""
        if not self.options.oldest_segment_first:
            return 0
        self._segments_made += 1
        return self._segments_made << ADDRESS

    def record(self, action: str, addr: int, size: int, shelf: Shelf) -> None:
        """Add an event to the history, if one is kept."""
        if self.history is not None:
            self.history.append((action, addr, size, shelf.stream, self.context, shelf.pool.id))

    def segments(self) -> list[list[Block]]:
        """Every segment as its blocks, by address. Of an expandable one: each stretch that is mapped."""
        found = list(self.live.values()) + list(self.awaiting.values())
        for pair in self.pools.values():
            for pool in pair:
                for shelf in pool.shelves.values():
                    found += shelf.by_key.values()
        heads = [block for block in found if block.prev is None or block.prev.state == UNMAPPED]
        segments = []
        for head in sorted(heads, key=lambda block: block.addr):
            blocks = []
            block: Block | None = head
            while block is not None and block.state != UNMAPPED:
                blocks.append(block)
                block = block.next
            segments.append(blocks)
        return segments

    # -- taking --------------------------------------------------------------------------------------

    def new_memory(self, shelf: Shelf, rounded: int) -> Block | None:
        """A new segment, or more pages of an expandable one; None if the device has no more."""
        size = self.options.segment(rounded)
        if self.allowed_bytes is not None and self.total.reserved_bytes + size > self.allowed_bytes:
            return None
        if self._expandable:
            return self._expand(shelf, rounded)
        addr = self.driver.allocate(size, shelf.stream, shelf.small)
        if addr is None:
            return None
        self.num_device_alloc += 1
        for numbers in (shelf.statistics, self.total):
            numbers.reserve(1, size)
        if self.options.max_split_bytes is not None and size >= self.options.max_split_bytes:
            self.oversize_segments += 1
        self.record("segment_alloc", addr, size, shelf)
        return Block(addr, size, shelf, None, None, ALLOCATED, self.new_order())

    def _expand(self, shelf: Shelf, rounded: int) -> Block | None:
        block = self._room(shelf, rounded)
        if block.state == UNMAPPED and not self._map(block, min(block.size, rounded)):
            return None
        while block.size < rounded:
            after = block.next
            assert after is not None, "the room that was found is large enough"
            if not self._map(after, min(rounded - block.size, after.size)):
                return None
            block = after  # it has taken `block` in
        shelf.take(block)
        return block

    def _room(self, shelf: Shelf, rounded: int) -> Block:
        """The lowest unmapped block that, with its free neighbours, has room; else a new region."""
        for block in shelf.unmapped:
            first = block.prev if block.prev is not None and block.prev.state == FREE else block
            room = 0
            here: Block | None = first
            while room < rounded and here is not None and here.state in (FREE, UNMAPPED):
                room += here.size
                here = here.next
            if room >= rounded:
                return first
        page = SMALL_SEGMENT if shelf.small else self.options.large_segment_bytes
        memory = self.driver.total_bytes()
        size = -(-(memory + memory // 8) // page) * page
        region = Region(self.driver.reserve(size, shelf.stream, shelf.small), size, page)
        shelf.regions.append(region)
        shelf.regions.sort(key=lambda region: region.addr)
        whole = Block(region.addr, size, shelf, None, None, UNMAPPED, self.new_order())
        self._put_unmapped(whole)
        return whole

    def _map(self, block: Block, size: int) -> bool:
        """Put pages behind the front of an unmapped block, and join it with its free neighbours."""
        shelf = block.shelf
        page = _region(block).page
        whole = -(-size // page) * page
        addr = block.addr
        if not self.driver.map(addr, whole):
            return False
        shelf.unmapped.remove(block)
        if whole < block.size:
            rest = Block(addr + whole, block.size - whole, shelf, block, block.next, UNMAPPED, block.order)
            if rest.next is not None:
                rest.next.prev = rest
            block.next = rest
            block.size = whole
            self._put_unmapped(rest)
        block.state = FREE
        self._join(block, FREE)
        shelf.put(block)
        for numbers in (shelf.statistics, self.total):
            numbers.reserve(0, whole)
        self.num_device_alloc += 1
        self.record("segment_map", addr, whole, shelf)
        return True

    def _put_unmapped(self, block: Block) -> None:
        block.state = UNMAPPED
        unmapped = block.shelf.unmapped
        unmapped.insert(bisect_left([other.addr for other in unmapped], block.addr), block)

    def _join(self, block: Block, state: int) -> None:
        """Take the neighbours of that state in; the block itself is in no set."""
        shelf = block.shelf
        before, after = block.prev, block.next
        if before is not None and before.state == state:
            shelf.take(before) if state == FREE else shelf.unmapped.remove(before)
            block.addr = before.addr
            block.size += before.size
            block.prev = before.prev
            if before.prev is not None:
                before.prev.next = block
        if after is not None and after.state == state:
            shelf.take(after) if state == FREE else shelf.unmapped.remove(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.prev = block

    # -- giving back ---------------------------------------------------------------------------------

    def release(self, block: Block) -> None:
        """Give a free block that is a whole segment back."""
        shelf = block.shelf
        shelf.take(block)
        self.num_device_free += 1
        self.record("segment_free", block.addr, block.size, shelf)
        self.driver.release(block.addr, block.size)
        for numbers in (shelf.statistics, self.total):
            numbers.reserve(-1, -block.size)
        if self.options.max_split_bytes is not None and block.size >= self.options.max_split_bytes:
            self.oversize_segments -= 1

    def release_available(self, shelf: Shelf, rounded: int) -> bool:
        """With a limit on splitting: give back one cached block of that size, or the largest until it is enough."""
        most = self.options.max_split_bytes
        if most is None or self._expandable:
            return False
        wanted = max(rounded, most)
        i = bisect_left(shelf.keys, wanted << KEY)
        if i < len(shelf.keys):
            self.release(shelf.by_key[shelf.keys[i]])
            return True
        released = 0
        while released < wanted and shelf.keys and shelf.keys[-1] >> KEY >= most:
            released += shelf.keys[-1] >> KEY
            self.release(shelf.by_key[shelf.keys[-1]])
        return released >= wanted

    def release_cached(self) -> None:
        """Wait for every stream, then give all segments back that are free: large ones first, by stream and size."""
        self.num_sync_all_streams += 1
        queues, self._queues = self._queues, {}
        self._done.clear()
        for queue in queues.values():
            for block in queue:
                self._event_passed(block)
        small, large = self.pools[0, 0]
        for pool in (large, small):
            for shelf in pool.shelves.in_order():
                for block in shelf.free_blocks():
                    if self._expandable:
                        self._unmap(block)
                    elif block.prev is None and block.next is None:
                        self.release(block)

    def _unmap(self, block: Block) -> None:
        """Take the whole pages of a free block away."""
        shelf = block.shelf
        region = _region(block)
        start, stop = whole_pages(block)
        if start < stop:
            shelf.take(block)
            if block.addr < start:
                front = Block(block.addr, start - block.addr, shelf, block.prev, block, FREE, block.order)
                if front.prev is not None:
                    front.prev.next = front
                block.prev = front
                shelf.put(front)
            if stop < block.addr + block.size:
                back = Block(stop, block.addr + block.size - stop, shelf, block, block.next, FREE, block.order)
                if back.next is not None:
                    back.next.prev = back
                block.next = back
                shelf.put(back)
            block.addr, block.size = start, stop - start
            self.driver.unmap(start, stop - start)
            block.state = UNMAPPED
            self._join(block, UNMAPPED)
            self._put_unmapped(block)
            for numbers in (shelf.statistics, self.total):
                numbers.reserve(0, start - stop)
            self.num_device_free += 1
            self.record("segment_unmap", start, stop - start, shelf)
            if block.prev is None and block.next is None:
                shelf.unmapped.remove(block)
                shelf.regions.remove(region)
                self.driver.unreserve(region.addr, region.size)

    def collect_garbage(self) -> None:
        """Above the threshold: give back large segments that lay unused for longer than the average, until below."""
        assert self.allowed_bytes is not None
        threshold = int(self.options.garbage_collection_threshold * self.allowed_bytes)
        wanted = self.total.reserved_bytes - threshold
        if wanted <= 0:
            return
        large = self.pools[0, 0][1]
        whole = [
            block
            for shelf in large.shelves.in_order()
            for block in shelf.free_blocks()
            if block.prev is None and block.next is None and not self._expandable
        ]
        age = sum(large.calls - block.born for block in whole)
        reclaimed = 0
        while reclaimed < wanted and whole:
            # age / len(whole) is the average; compared without division
            old = [block for block in whole if (large.calls - block.born) * len(whole) >= age]
            kept = [block for block in whole if block not in old]
            for block in old:
                reclaimed += block.size
                age -= large.calls - block.born
                self.release(block)
            whole = kept

    def _event_passed(self, block: Block) -> None:
        block.events -= 1
        if block.events == 0:
            self.finish_block(block)

    def finish_block(self, block: Block) -> None:
        """No stream uses the block any more."""
        del self.awaiting[block.addr]
        for numbers in (block.shelf.statistics, self.total):
            numbers.awaiting -= 1
            numbers.awaiting_bytes -= block.size
        self.complete(block)

    def complete(self, block: Block) -> None:
        """The block is free now."""
        raise NotImplementedError


def whole_pages(block: Block) -> tuple[int, int]:
    """Where the pages that lie in a block as a whole begin and end; there are none if the end is not above."""
    region = _region(block)
    start = region.addr + -(-(block.addr - region.addr) // region.page) * region.page
    return start, region.addr + (block.addr + block.size - region.addr) // region.page * region.page


def _region(block: Block) -> Region:
    """The reserved addresses that a block lies in."""
    for region in block.shelf.regions:
        if region.addr <= block.addr < region.addr + region.size:
            return region
    raise AssertionError(f"{block} lies in no region")
