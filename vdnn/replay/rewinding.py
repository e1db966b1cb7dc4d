"""What was there before the first recorded event: the segments at the end, with the events taken back.

    start = the end − what was allocated and mapped since + what was freed and unmapped since

A block that was there at the start and is gone at the end is known by its address and the bytes asked for. Its size
is the rounded request. What is left up to the next block, if it is too little to have been split off, is its tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdnn.errors import FormatError
from vdnn.sim.allocator.options import MIN_BLOCK, SMALL_MOST, SMALL_SEGMENT, AllocatorOptions
from vdnn.sim.allocator.restoring import Stretch
from vdnn.snapshots import EventRecord, SegmentRecord

__all__ = ["Start", "rewind"]


@dataclass(frozen=True, slots=True)
class Start:
    """The state before the first event; `blocks` in it, of which `assumed` have a size that is not recorded."""

    stretches: tuple[Stretch, ...]
    blocks: int
    assumed: int


@dataclass(slots=True)
class _Range:
    size: int
    stream: int
    small: bool | None
    pool: tuple[int, int]


def rewind(segments: Sequence[SegmentRecord], events: Sequence[EventRecord], options: AllocatorOptions) -> Start:
    """The state before the first event.

    Raises:
        FormatError: the events do not lead to the segments; names the event.
    """
    ranges = {s.addr: _Range(s.size, s.stream, s.small, s.pool) for s in segments}
    # address → size (None: not known), state, requested
    blocks: dict[int, tuple[int | None, str, int]] = {
        b.addr: (b.size, b.state, b.requested) for s in segments for b in s.blocks if b.state != "free"
    }
    for i in range(len(events) - 1, -1, -1):
        e = events[i]
        if e.action == "alloc":
            if blocks.pop(e.addr, None) is None:
                raise FormatError(
                    f"event {i} allocates at {e.addr:#x}, and the block is never freed nor there at the end"
                )
        elif e.action == "free_completed":
            blocks[e.addr] = (None, "awaiting", e.size)
        elif e.action == "free_requested":
            size, _, requested = blocks.get(e.addr, (None, "", -1))
            if requested < 0:
                raise FormatError(f"event {i} frees {e.addr:#x}, and the block does not become free after it")
            blocks[e.addr] = (size, "allocated", requested)
        elif e.action in ("segment_free", "segment_unmap"):
            _add(ranges, e)
        elif e.action in ("segment_alloc", "segment_map"):
            _remove(ranges, e, i)
    return _start(ranges, blocks, options)


def _add(ranges: dict[int, _Range], e: EventRecord) -> None:
    """A mapped range that was given back; expandable ones join what is mapped beside them."""
    found = _Range(e.size, e.stream, None, e.pool)
    addr = e.addr
    if e.action == "segment_unmap":
        after = ranges.pop(addr + e.size, None)
        if after is not None:
            found = _Range(e.size + after.size, e.stream, after.small, e.pool)
        before = next((a for a, r in ranges.items() if a + r.size == addr), None)
        if before is not None:
            joined = ranges.pop(before)
            addr, found = before, _Range(joined.size + found.size, e.stream, joined.small, e.pool)
    ranges[addr] = found


def _remove(ranges: dict[int, _Range], e: EventRecord, i: int) -> None:
    addr = e.addr if e.addr in ranges else next((a for a, r in ranges.items() if a < e.addr < a + r.size), -1)
    whole = ranges.pop(addr, None)
    if whole is None or e.addr + e.size > addr + whole.size or (e.action == "segment_alloc" and whole.size != e.size):
        raise FormatError(f"event {i} ({e.action}) takes {e.size} bytes at {e.addr:#x}, which no segment holds then")
    if addr < e.addr:
        ranges[addr] = _Range(e.addr - addr, whole.stream, whole.small, whole.pool)
    end = addr + whole.size
    if e.addr + e.size < end:
        ranges[e.addr + e.size] = _Range(end - e.addr - e.size, whole.stream, whole.small, whole.pool)


def _start(
    ranges: dict[int, _Range], blocks: dict[int, tuple[int | None, str, int]], options: AllocatorOptions
) -> Start:
    waiting = sorted(blocks, reverse=True)
    stretches = []
    assumed = 0
    for addr in sorted(ranges):
        found = ranges[addr]
        end = addr + found.size
        inside = []
        while waiting and waiting[-1] < end:
            inside.append(waiting.pop())
        if inside and inside[0] < addr:
            raise FormatError(f"a block at {inside[0]:#x} is in no segment")
        requests = [options.rounded(max(blocks[a][2], 1)) for a in inside]
        small = found.small
        if small is None:  # the segment is gone at the end: only what was in it, or its size, tells
            small = all(r <= SMALL_MOST for r in requests) if requests else found.size <= SMALL_SEGMENT
        filled = []
        here = addr
        for a, rounded, following in zip(inside, requests, [*inside, end][1:], strict=True):
            size, state, requested = blocks[a]
            if size is None:
                room = following - a
                tail = room - rounded
                split = MIN_BLOCK if small or options.expandable_segments else SMALL_MOST + 1
                if not small and options.max_split_bytes is not None and rounded >= options.max_split_bytes:
                    split = found.size  # never split, so the block is the whole segment
                size = room if tail < split else rounded
                assumed += tail >= split
            if a < here or a + size > following:
                raise FormatError(f"blocks overlap at {a:#x} before the first event")
            if here < a:
                filled.append((here, a - here, "free", 0))
            filled.append((a, size, state, requested))
            here = a + size
        if here < end:
            filled.append((here, end - here, "free", 0))
        stretches.append(Stretch(addr, found.size, found.stream, small, found.pool, filled))
    if waiting:
        raise FormatError(f"a block at {waiting[-1]:#x} is in no segment")
    return Start(tuple(stretches), len(blocks), assumed)
