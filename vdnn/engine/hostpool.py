"""Host memory for offloaded storages: taken once, reused step after step.

torch rounds a pinned block up to a power of two (up to twice the bytes). The pool takes slabs of plain
memory in exact sizes (whole pages of their own) and has the device pin them (`cudaHostRegister`), so bytes pinned are
bytes used. What a plan moves lies in one slab (`arena`); any other block is a slab of its own. Free blocks are kept by
size; a step that repeats itself takes the same blocks again, and no memory is pinned after the first step.

A slab comes from the system, not from malloc: its pages are shared with nothing else (the driver may refuse a page
that is pinned already), and where they are pinned a forked process, a data loader's worker, does not get them: Linux
(since 5.9) copies every pinned page of a process that forks, for each worker.
"""

from __future__ import annotations

import mmap
import threading
import warnings
from collections import deque
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from vdnn.engine.device import Event, HostBlock, HostUse, Slab
from vdnn.errors import UsageError
from vdnn.ledger import mark_as_host
from vdnn.units import format_bytes

__all__ = ["HostPool"]

PAGE_BYTES = 4096


class HostPool:
    """Blocks of host memory.

    Args:
        pin: page-locks a flat uint8 CPU tensor and returns what keeps it so, or None if that failed.
            No function at all: pageable memory is what is wanted.
        budget_bytes: reserve no more than this; None for no limit.
    """

    def __init__(self, pin: Callable[[torch.Tensor], object | None] | None, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and budget_bytes < 0:
            raise UsageError(f"a host budget of {budget_bytes} bytes is negative: give 0 or more")
        self.budget_bytes = budget_bytes
        self.reserved_bytes = 0
        self.pinned_bytes = 0
        self.used_bytes = 0
        self.peak_bytes = 0
        self.allocations = 0
        self.lock = threading.Lock()
        self._pin = pin
        self._free: dict[int, deque[HostBlock]] = {}
        # Blocks come back when the object that autograd holds dies, in any thread and even while this very
        # thread is inside `take`: an append to a deque is atomic, and `take` empties it under the lock.
        self._returned: deque[HostBlock] = deque()
        self._lost: deque[tuple[int, Slab]] = deque()
        self._gone: deque[tuple[int, bool]] = deque()
        self._warned: set[str] = set()

    def take(self, nbytes: int) -> HostBlock | None:
        """A block of at least `nbytes`, or None where neither the budget nor the machine has room for it."""
        size = _pages(nbytes)
        with self.lock:
            self.collect()
            block = self._pop(size) or self._new(size)
            return None if block is None else self.hand_out(block, nbytes)

    def hand_out(self, block: HostBlock, nbytes: int) -> HostBlock:
        """Note that a block is in use; the caller has the lock, and took the block from its home."""
        block.nbytes = nbytes
        block.lost = self._lost.append
        self.used_bytes += block.data.numel()
        if self.used_bytes > self.peak_bytes:
            self.peak_bytes = self.used_bytes
        return block

    def give_back(self, block: HostBlock, busy: Event | None) -> None:
        """Return a block; whoever takes it next waits for `busy` before writing."""
        block.busy = busy
        self._returned.append(block)

    def trim(self) -> None:
        """Give free memory back to the system, without waiting for the collector."""
        with self.lock:
            self.collect()
            self._free.clear()
            self.collect()

    def sizes(self) -> HostUse:
        """What is in use and reserved."""
        with self.lock:
            self.collect()
            return HostUse(self.used_bytes, self.peak_bytes, self.reserved_bytes, self.pinned_bytes, self.allocations)

    def collect(self) -> None:
        """Send the blocks home that came back; the caller has the lock."""
        while self._returned:
            block = self._returned.popleft()
            block.lost = None
            self.used_bytes -= block.data.numel()
            home = block.home()
            if home is not None:
                home.append(block)
        while self._lost:
            size, slab = self._lost.popleft()
            self.used_bytes -= size
            slab.spoiled = True
            del slab  # its end may be here, and is counted next
        while self._gone:
            size, pinned = self._gone.popleft()
            self.reserved_bytes -= size
            self.pinned_bytes -= size if pinned else 0

    def _pop(self, size: int) -> HostBlock | None:
        """A free block of that size, or else the smallest that is at most an eighth larger."""
        free = self._free.get(size)
        if free:
            return free.pop()
        fitting = [s for s, blocks in self._free.items() if blocks and size < s <= size + size // 8]
        return self._free[min(fitting)].pop() if fitting else None

    def _new(self, size: int) -> HostBlock | None:
        slab = self.slab(size)
        return None if slab is None else HostBlock(slab, 0, size, self._free.setdefault(size, deque()))

    def _shrink(self, wanted: int) -> None:
        """Let go of free blocks, largest first, until `wanted` bytes are gone."""
        for size in sorted(self._free, reverse=True):
            while self._free[size] and wanted > 0:
                self._free[size].pop()
                wanted -= size
        self.collect()

    def slab(self, nbytes: int) -> Slab | None:
        """A new piece of memory of whole pages, None where there is no room; the caller has the lock."""
        size = _pages(nbytes)
        if self.budget_bytes is not None and self.reserved_bytes + size > self.budget_bytes:
            self._shrink(self.reserved_bytes + size - self.budget_bytes)
            if self.reserved_bytes + size > self.budget_bytes:
                self._warn(
                    f"the host budget of {format_bytes(self.budget_bytes)} is spent: "
                    f"{format_bytes(size)} and whatever follows stay on the device; raise the budget"
                )
                return None
        try:
            with _disable_current_modes():  # host memory is not the device's: no account may see it
                data = torch.frombuffer(_mapped(size, self._pin is not None), dtype=torch.uint8)
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            self._warn(
                f"the host has no room for {format_bytes(size)} more ({format_bytes(self.reserved_bytes)} are "
                f"reserved; {str(error).splitlines()[0]}): they stay on the device; give a smaller host budget"
            )
            return None
        mark_as_host(data)
        pin = self._pin(data) if self._pin is not None else None
        if self._pin is not None and pin is None:
            self._warn("host memory could not be pinned: pageable memory is used, and copies will not overlap")
        self.reserved_bytes += size
        self.pinned_bytes += size if pin is not None else 0
        self.allocations += 1
        return Slab(data, pin, self._gone.append)

    def _warn(self, text: str) -> None:
        kind = text[:15]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=5)


def _mapped(size: int, alone: bool) -> mmap.mmap:
    """New memory, which goes back to the system with the object; `alone`: a process that is forked has none of it."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if alone and hasattr(mmap, "MADV_DONTFORK"):
        memory.madvise(mmap.MADV_DONTFORK)
    return memory


def _pages(nbytes: int) -> int:
    return -(-max(nbytes, 1) // PAGE_BYTES) * PAGE_BYTES
