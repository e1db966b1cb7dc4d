"""Puts an allocator into a state that was recorded: segments with their blocks, and nothing known of before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vdnn.sim.allocator.blocks import ALLOCATED, AWAITING, FREE, UNMAPPED, Block, Region
from vdnn.sim.allocator.caching import CachingAllocator
from vdnn.sim.allocator.options import SMALL_SEGMENT

__all__ = ["Stretch", "restore"]


class Stretch(NamedTuple):
    """A segment, or a mapped stretch of an expandable one: its blocks as (address, size, state, requested)."""

    addr: int
    size: int
    stream: int
    small: bool
    pool: tuple[int, int]
    blocks: list[tuple[int, int, str, int]]


def restore(allocator: CachingAllocator, stretches: Iterable[Stretch]) -> None:
    """Take the stretches over. An expandable segment begins where its lowest stretch does."""
    expandable = allocator.options.expandable_segments
    last: dict[tuple[object, ...], tuple[Block, int]] = {}  # of an expandable segment: its last block, and its end
    for stretch in sorted(stretches, key=lambda stretch: stretch.addr):
        shelf = allocator.pools[stretch.pool][not stretch.small].shelves[stretch.stream]
        previous: Block | None = None
        if expandable:
            region = next((r for r in shelf.regions if r.addr <= stretch.addr < r.addr + r.size), None)
            if region is None:
                page = SMALL_SEGMENT if stretch.small else allocator.options.large_segment_bytes
                memory = allocator.driver.total_bytes()
                region = Region(stretch.addr, -(-(memory + memory // 8) // page) * page, page)
                shelf.regions.append(region)
            elif (key := (id(shelf), region.addr)) in last:
                before, end = last[key]
                previous = before.next = Block(end, stretch.addr - end, shelf, before, None, UNMAPPED, before.order)
                shelf.unmapped.append(previous)
        order = previous.order if previous is not None else allocator.new_order()
        alone = len(stretch.blocks) == 1
        for addr, size, state, requested in stretch.blocks:
            block = Block(addr, size, shelf, previous, None, FREE, order)
            if previous is not None:
                previous.next = block
            previous = block
            block.requested = requested
            for numbers in (shelf.statistics, allocator.total):
                numbers.requested_bytes += requested
                if state == "allocated":
                    numbers.allocation += 1
                    numbers.allocated_bytes += size
                elif state == "awaiting":
                    numbers.awaiting += 1
                    numbers.awaiting_bytes += size
                elif not alone and not expandable:
                    numbers.split(1, size)
            if state == "allocated":
                block.state = ALLOCATED
                allocator.live[addr] = block
            elif state == "awaiting":
                block.state = AWAITING
                block.events = 1
                allocator.awaiting[addr] = block
            else:
                shelf.put(block)
        for numbers in (shelf.statistics, allocator.total):
            numbers.reserve(0 if expandable else 1, stretch.size)
        if expandable and previous is not None:
            last[id(shelf), region.addr] = previous, stretch.addr + stretch.size  # type: ignore[union-attr]
    if expandable:
        for pair in allocator.pools.values():
            for pool in pair:
                for shelf in pool.shelves.values():
                    for region in shelf.regions:
                        block, end = last[id(shelf), region.addr]
                        if end < region.addr + region.size:
                            rest = Block(
                                end, region.addr + region.size - end, shelf, block, None, UNMAPPED, block.order
                            )
                            block.next = rest
                            shelf.unmapped.append(rest)
                    shelf.unmapped.sort(key=lambda block: block.addr)
    for pair in allocator.pools.values():
        for pool in pair:
            _peaks(pool.statistics)
    _peaks(allocator.total)


def _peaks(numbers: object) -> None:
    for name in ("allocation", "allocated_bytes", "requested_bytes"):
        setattr(numbers, f"{name}_peak", getattr(numbers, name))
    numbers.note_active()  # type: ignore[attr-defined]
