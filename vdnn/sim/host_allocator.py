"""The pinned-host allocator, as torch has it: powers of two, never split, never joined.

    allocate   take what its streams are done with, in the order of the events, up to the first that is not
               round up to a power of two (above the threshold: not at all)
               the block of the same bucket that was freed last and is large enough, else new pinned memory
    free       used by no stream: to the end of its bucket; else wait for an event of each such stream

A bucket holds sizes up to one power of two, so what is freed serves only requests of nearly its own size, and a
request may take up to twice its bytes. Nothing goes back to the system but by `empty_cache`, or when a freed block
is larger than the largest that is cached. Background threads, the reserved segment and private pools are not in it.
Source: ATen/core/CachingHostAllocator.h of PyTorch 2.14.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from vdnn.errors import UsageError

__all__ = ["HostAllocator", "HostStatistics"]

_FIRST = 0x7E00_0000_0000
_PAGE = 4096


@dataclass(slots=True)
class HostStatistics:
    """As `torch.cuda.host_memory_stats()` names them: `allocated` with what is cached, `active` without.

    torch adds the peaks of the buckets up for `active`, which is more than was ever active at once; so does this.
    """

    allocated_bytes: int = 0
    allocated_bytes_peak: int = 0
    allocations: int = 0
    num_host_alloc: int = 0
    num_host_free: int = 0


class _Block:
    __slots__ = ("active", "addr", "events", "size", "streams")

    def __init__(self, addr: int, size: int) -> None:
        self.addr = addr
        self.size = size
        self.streams: list[int] = []
        self.events = 0
        self.active = True


class HostAllocator:
    """Pinned memory as torch hands it out. Addresses and sizes in bytes; streams are numbers.

    Args:
        max_round_bytes: `pinned_max_round_threshold_mb`: larger requests are not rounded (None: all are).
        max_cached_bytes: `pinned_max_cached_size_mb`: larger blocks go back to the system when freed (None: none).
    """

    def __init__(self, *, max_round_bytes: int | None = None, max_cached_bytes: int | None = None) -> None:
        for name, size in (("max_round_bytes", max_round_bytes), ("max_cached_bytes", max_cached_bytes)):
            if size is not None and size < 0:
                raise UsageError(f"{name} of {size} is negative: give bytes, or None for no limit")
        limits = [size for size in (max_round_bytes, max_cached_bytes) if size is not None]
        self._round_most = min(limits) if limits else None
        self._cached_most = max_cached_bytes
        self.statistics = HostStatistics()
        self._live: dict[int, _Block] = {}
        self._buckets: dict[int, list[_Block]] = {}
        self._events: deque[tuple[int, int, _Block]] = deque()  # stream, its number there, block; oldest first
        self._recorded: dict[int, int] = {}
        self._passed: dict[int, int] = {}
        self._active: dict[int, list[int]] = {}  # bucket → bytes now, and at the peak
        self._next = _FIRST

    def rounded(self, size: int) -> int:
        """What a request takes, in bytes."""
        if self._round_most is not None and size > self._round_most:
            return size
        return 1 << (size - 1).bit_length()

    def allocate(self, size: int) -> int:
        """The address of a pinned block.

        Raises:
            UsageError: a size that is not positive (torch gives no memory for it).
        """
        if size <= 0:
            raise UsageError(f"cannot pin {size} bytes: give more than 0")
        self._process_events()
        rounded = self.rounded(size)
        bucket = _bucket(rounded)
        cached = self._buckets.get(bucket, [])
        for i in range(len(cached) - 1, -1, -1):
            if cached[i].size >= rounded:
                block = cached.pop(i)
                block.active = True
                break
        else:
            block = _Block(self._next, rounded)
            self._next += -(-rounded // _PAGE) * _PAGE
            numbers = self.statistics
            numbers.num_host_alloc += 1
            numbers.allocations += 1
            numbers.allocated_bytes += rounded
            numbers.allocated_bytes_peak = max(numbers.allocated_bytes_peak, numbers.allocated_bytes)
        self._live[block.addr] = block
        self._count(block, block.size)
        return block.addr

    def record_event(self, addr: int, stream: int) -> None:
        """A stream uses the block: after `free` it is not handed out before that stream has finished.

        Raises:
            UsageError: nothing is allocated at that address.
        """
        block = self._at(addr)
        if stream not in block.streams:
            block.streams.append(stream)

    def free(self, addr: int) -> None:
        """Give a block back.

        Raises:
            UsageError: nothing is allocated at that address.
        """
        block = self._at(addr)
        del self._live[addr]
        block.active = False
        streams, block.streams = block.streams, []
        if not streams:
            self._cache(block)
        block.events = len(streams)
        for stream in streams:
            number = self._recorded[stream] = self._recorded.get(stream, 0) + 1
            self._events.append((stream, number, block))

    def finish(self, stream: int) -> None:
        """The stream has done all that was asked of it so far."""
        self._passed[stream] = self._recorded.get(stream, 0)

    def empty_cache(self) -> None:
        """Give everything back that is free and not waited for."""
        self._process_events()
        for blocks in self._buckets.values():
            for block in blocks:
                self._destroy(block)
        self._buckets.clear()

    @property
    def active_bytes(self) -> int:
        """Bytes of blocks that are in use, or waited for."""
        return sum(now for now, _ in self._active.values())

    @property
    def active_bytes_peak(self) -> int:
        """The sum over the buckets of each one's own peak."""
        return sum(peak for _, peak in self._active.values())

    def _at(self, addr: int) -> _Block:
        block = self._live.get(addr)
        if block is None:
            raise UsageError(f"no pinned block is allocated at {addr:#x}: it was freed before, or never handed out")
        return block

    def _process_events(self) -> None:
        """Oldest first, and not past one that is still to come, whatever stream it is of."""
        while self._events:
            stream, number, block = self._events[0]
            if number > self._passed.get(stream, 0):
                return
            self._events.popleft()
            block.events -= 1
            if block.events == 0:
                self._cache(block)

    def _cache(self, block: _Block) -> None:
        self._count(block, -block.size)
        if self._cached_most is not None and block.size > self._cached_most:
            self._destroy(block)
        else:
            self._buckets.setdefault(_bucket(block.size), []).append(block)

    def _destroy(self, block: _Block) -> None:
        self.statistics.num_host_free += 1
        self.statistics.allocations -= 1
        self.statistics.allocated_bytes -= block.size

    def _count(self, block: _Block, change: int) -> None:
        numbers = self._active.setdefault(_bucket(block.size), [0, 0])
        numbers[0] += change
        numbers[1] = max(numbers)


def _bucket(size: int) -> int:
    """The exponent of the power of two that is not below the size."""
    return (size - 1).bit_length()
