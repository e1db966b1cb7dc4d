"""The CUDA caching allocator, to the byte and the address.

    malloc   take what other streams are done with
             round up; the small pool holds blocks up to 1 MiB
             the smallest free block of the same stream that is large enough;
             of equal ones that in the oldest segment, and there the lowest
             none: collect garbage → a new segment → give cached oversize blocks back, again →
                   give every cached segment back, again → out of memory
             split off what is left over, if it is enough for a block (small: 512 bytes, large: more than 1 MiB)
    free     used by no other stream: join the free neighbours, and be free
             else wait for an event of each such stream

Blocks never change streams. Nothing here knows the time: `finish(stream)` says that a stream has got to where it is.
Source: c10/cuda/CUDACachingAllocator.cpp, as in PyTorch 2.11 to 2.14. CUDA graphs' private pools are told apart,
their life is not modelled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import NoReturn

from vdnn.errors import DeviceOutOfMemory, UsageError
from vdnn.sim.allocator.blocks import ALLOCATED, AWAITING, FREE, KEY, UNMAPPED, Block, Shelf
from vdnn.sim.allocator.driver import AddressSpace, Driver
from vdnn.sim.allocator.options import MIN_BLOCK, SMALL_MOST, AllocatorOptions
from vdnn.sim.allocator.releasing import Releasing
from vdnn.sim.allocator.statistics import torch_statistics
from vdnn.units import format_bytes

__all__ = ["DEFAULT_POOL", "CachingAllocator"]

DEFAULT_POOL = (0, 0)


class CachingAllocator(Releasing):
    """Device memory as torch hands it out. Addresses and sizes in bytes, streams are numbers (0: the default one).

    `allowed_bytes` is what `torch.cuda.set_per_process_memory_fraction` sets. `history`, once it is a list, gets
    every event as (action, address, size, stream, `context`, pool), with the names of torch's memory snapshots.
    """

    def __init__(
        self,
        driver: Driver | None = None,
        options: AllocatorOptions | None = None,
        *,
        allowed_bytes: int | None = None,
    ) -> None:
        super().__init__(driver or AddressSpace(), options or AllocatorOptions(), allowed_bytes)
        self._small, self._large = (self.pools[DEFAULT_POOL][i].shelves for i in (0, 1))
        self._plain_rounding = not any(divisions > 1 for divisions in self.options.roundup_divisions)
        self._plain_search = self.options.max_split_bytes is None and not self._expandable and not self._collects
        self._largest_split = self.options.max_split_bytes or 1 << 62

    # -- the calls of a program ----------------------------------------------------------------------

    def malloc(self, size: int, stream: int = 0, pool: tuple[int, int] = DEFAULT_POOL) -> int:
        """The address of a new block for `size` bytes.

        Raises:
            DeviceOutOfMemory: neither cached memory nor the device has as much, even after all cache was given back.
            UsageError: a size that is not positive (torch allocates nothing for empty tensors).
        """
        if size <= 0:
            raise UsageError(f"cannot allocate {size} bytes: an empty tensor has no block")
        if self._queues:
            self.poll()
        rounded = (size + 511) & -512 if self._plain_rounding else self.options.rounded(size)
        if pool is DEFAULT_POOL:
            shelf = (self._small if rounded <= SMALL_MOST else self._large)[stream]
        else:
            shelf = self.pools[pool][rounded > SMALL_MOST].shelves[stream]
        if self._plain_search:
            keys = shelf.keys
            i = bisect_left(keys, rounded << KEY)
            block = shelf.by_key.pop(keys.pop(i)) if i < len(keys) else self.grow(shelf, rounded)
        else:
            block = self.search(shelf, rounded) or self.grow(shelf, rounded)
        if block is None:
            self._out_of_memory(size, rounded, shelf)
        return self.place(block, rounded, size)

    def free(self, addr: int) -> None:
        """Give a block back.

        Raises:
            UsageError: nothing is allocated at that address.
        """
        block = self.live.pop(addr, None)
        if block is None:
            raise UsageError(f"nothing is allocated at {addr:#x}: it was freed before, or never handed out")
        numbers, total, size = block.shelf.statistics, self.total, block.size
        numbers.allocation -= 1
        numbers.allocated_bytes -= size
        total.allocation -= 1
        total.allocated_bytes -= size
        if size >= self._largest_split:
            self.oversize_allocations -= 1
        if self.history is not None:
            self.record("free_requested", addr, block.requested, block.shelf)
        if block.uses:
            self._await(block)
        else:
            self.complete(block)

    def record_stream(self, addr: int, stream: int) -> None:
        """Another stream uses the block: after `free` it stays taken until that stream has finished.

        Raises:
            UsageError: nothing is allocated at that address.
        """
        block = self.live.get(addr)
        if block is None:
            raise UsageError(f"nothing is allocated at {addr:#x}: record the stream before the block is freed")
        if stream != block.shelf.stream:
            block.uses = block.uses or []
            if stream not in block.uses:
                block.uses.append(stream)

    def finish(self, stream: int) -> None:
        """The stream has done all that was asked of it so far. The allocator notices at the next `malloc`."""
        if stream in self._queues:
            self._done[stream] = len(self._queues[stream])

    def empty_cache(self) -> None:
        """Wait for all streams, and give every segment back that no block is in."""
        self.release_cached()

    def statistics(self) -> dict[str, int]:
        """What `torch.cuda.memory_stats()` calls so, as far as it is modelled: current values and peaks."""
        pools = {"all": self.total}
        for name, i in (("small_pool", 0), ("large_pool", 1)):
            pools[name] = self.pools[DEFAULT_POOL][i].statistics
        return torch_statistics(pools) | {
            "num_alloc_retries": self.num_alloc_retries,
            "num_ooms": self.num_ooms,
            "num_sync_all_streams": self.num_sync_all_streams,
            "num_device_alloc": self.num_device_alloc,
            "num_device_free": self.num_device_free,
            "oversize_allocations.current": self.oversize_allocations,
            "oversize_segments.current": self.oversize_segments,
        }

    # -- parts of malloc, in order -------------------------------------------------------------------

    def poll(self) -> None:
        """Take the blocks whose other streams are done."""
        for stream, queue in list(self._queues.items()):
            for _ in range(self._done.pop(stream, 0)):
                self._event_passed(queue.popleft())
            if not queue:
                del self._queues[stream]

    def search(self, shelf: Shelf, rounded: int) -> Block | None:
        """The best free block, taken out of the free ones."""
        block = self.fitting(shelf, rounded)
        if self._collects:
            shelf.pool.calls += 1
        if block is not None:
            shelf.take(block)
        return block

    def fitting(self, shelf: Shelf, rounded: int) -> Block | None:
        """The best free block."""
        keys = shelf.keys
        i = bisect_left(keys, rounded << KEY)
        if i == len(keys):
            return None
        block = shelf.by_key[keys[i]]
        if self._expandable:
            # a block before unmapped addresses counts with what it can grow to, so larger ones may fit better
            for key in keys[i + 1 :]:
                other = shelf.by_key[key]
                if _reach(other) >= _reach(block):
                    break
                block = other
        most = self._largest_split
        if rounded < most <= block.size:
            return None
        if rounded >= most and block.size >= rounded + self.options.max_non_split_rounding_bytes:
            return None
        return block

    def grow(self, shelf: Shelf, rounded: int) -> Block | None:
        """A block from new memory, for which cached memory is given back if it must; not among the free ones."""
        if self._collects:
            self.collect_garbage()
        block = self.new_memory(shelf, rounded)
        if block is None and self.release_available(shelf, rounded):
            block = self.new_memory(shelf, rounded)
        if block is None:
            self.release_cached()
            self.num_alloc_retries += 1
            block = self.new_memory(shelf, rounded)
        return block

    def place(self, block: Block, rounded: int, size: int) -> int:
        """Hand a block out, or the front of it; the rest is free."""
        shelf = block.shelf
        numbers, total = shelf.statistics, self.total
        # Written out, and not in methods of the statistics: this and `complete` are where the time goes.
        rest = block.size - rounded
        if rest >= MIN_BLOCK and (
            shelf.small or self._expandable or (rest > SMALL_MOST and rounded < self._largest_split)
        ):
            before = block.prev
            addr = block.addr
            front = Block(addr, rounded, shelf, before, block, ALLOCATED, block.order)
            if before is not None:
                before.next = front
            if not self._expandable:
                if before is None and block.next is None:
                    numbers.split(1, rest)
                    total.split(1, rest)
                else:
                    numbers.inactive_split_bytes -= rounded
                    total.inactive_split_bytes -= rounded
            block.prev = front
            block.addr = addr + rounded
            block.size = rest
            block.state = FREE
            if self._collects:
                block.born = shelf.pool.calls
            key = rest << KEY | block.order + addr + rounded
            insort(shelf.keys, key)
            shelf.by_key[key] = block
            block = front
            taken = rounded
        else:
            addr = block.addr
            taken = block.size
            block.state = ALLOCATED
            if not self._expandable and (block.prev is not None or block.next is not None):
                numbers.inactive_split -= 1
                numbers.inactive_split_bytes -= taken
                total.inactive_split -= 1
                total.inactive_split_bytes -= taken
        block.requested = size
        self.live[addr] = block
        numbers.allocation = now = numbers.allocation + 1
        if now > numbers.allocation_peak:
            numbers.allocation_peak = now
        numbers.allocated_bytes = now = numbers.allocated_bytes + taken
        if now > numbers.allocated_bytes_peak:
            numbers.allocated_bytes_peak = now
        numbers.requested_bytes = now = numbers.requested_bytes + size
        if now > numbers.requested_bytes_peak:
            numbers.requested_bytes_peak = now
        total.allocation = now = total.allocation + 1
        if now > total.allocation_peak:
            total.allocation_peak = now
        total.allocated_bytes = now = total.allocated_bytes + taken
        if now > total.allocated_bytes_peak:
            total.allocated_bytes_peak = now
        total.requested_bytes = now = total.requested_bytes + size
        if now > total.requested_bytes_peak:
            total.requested_bytes_peak = now
        if self.awaiting:
            numbers.note_active()
            total.note_active()
        if taken >= self._largest_split:
            self.oversize_allocations += 1
        if self.history is not None:
            self.record("alloc", addr, size, shelf)
        return addr

    def _out_of_memory(self, size: int, rounded: int, shelf: Shelf) -> NoReturn:
        self.num_ooms += 1
        free = self.driver.free_bytes()
        if self.history is not None:
            self.record("oom", free, rounded, shelf)
        total = self.total
        unused = total.reserved_bytes - total.allocated_bytes
        raise DeviceOutOfMemory(
            f"tried to allocate {format_bytes(size)}: {format_bytes(self.driver.total_bytes())} in all, "
            f"{format_bytes(free)} free, {format_bytes(total.allocated_bytes)} allocated, {format_bytes(unused)} "
            "reserved but not allocated; offload more, or take a smaller batch"
        )

    # -- parts of free -------------------------------------------------------------------------------

    def complete(self, block: Block) -> None:
        """The block is free now, one with its free neighbours."""
        shelf = block.shelf
        numbers, total = shelf.statistics, self.total
        numbers.requested_bytes -= block.requested
        total.requested_bytes -= block.requested
        if self.history is not None:
            self.record("free_completed", block.addr, block.requested, shelf)
        keys, by_key = shelf.keys, shelf.by_key
        merged = 0
        freed = size = block.size
        before, after = block.prev, block.next
        if before is not None and before.state == FREE:
            key = before.size << KEY | before.order + before.addr
            del keys[bisect_left(keys, key)], by_key[key]
            merged = 1
            size += before.size
            block.addr = before.addr
            block.prev = before = before.prev
            if before is not None:
                before.next = block
        if after is not None and after.state == FREE:
            key = after.size << KEY | after.order + after.addr
            del keys[bisect_left(keys, key)], by_key[key]
            merged += 1
            size += after.size
            block.next = after = after.next
            if after is not None:
                after.prev = block
        block.size = size
        block.state = FREE
        if self._collects:
            block.born = shelf.pool.calls
        key = size << KEY | block.order + block.addr
        insort(keys, key)
        by_key[key] = block
        if before is not None or after is not None:
            blocks, nbytes = 1 - merged, freed
        elif merged:
            blocks, nbytes = -merged, freed - size
        else:
            return
        if self._expandable:
            return
        numbers.split(blocks, nbytes)
        total.split(blocks, nbytes)

    def _await(self, block: Block) -> None:
        block.state = AWAITING
        uses = block.uses or []
        block.uses = None
        block.events = len(uses)
        for pool in (block.shelf.statistics, self.total):
            pool.awaiting += 1
            pool.awaiting_bytes += block.size
        self.awaiting[block.addr] = block
        for stream in uses:
            self._queues.setdefault(stream, deque()).append(block)


def _reach(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and after.state == UNMAPPED else 0)
