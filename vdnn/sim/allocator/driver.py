"""Where segments come from: the part of CUDA that the allocator speaks to.

The allocator only asks. `AddressSpace` is a device of its own, deterministic: the lowest address that is free.
A replay puts the addresses of a recorded history in its place.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Protocol

__all__ = ["AddressSpace", "Driver"]

_ALIGNMENT = 2 << 20
_FIRST = 0x7F00_0000_0000  # as on a device; below 2**53, so that JavaScript's viewers can read it
_VIRTUAL = 0x4000_0000_0000  # where reserved address ranges begin


class Driver(Protocol):
    """What the allocator asks of the device. Sizes in bytes; None and False: out of memory."""

    def allocate(self, size: int, stream: int, small: bool) -> int | None:
        """A new segment's address."""
        ...

    def release(self, addr: int, size: int) -> None:
        """Give a segment back."""
        ...

    def reserve(self, size: int, stream: int, small: bool) -> int:
        """The first of `size` addresses without memory behind them, for an expandable segment."""
        ...

    def unreserve(self, addr: int, size: int) -> None:
        """Give such addresses back."""
        ...

    def map(self, addr: int, size: int) -> bool:
        """Put memory behind reserved addresses."""
        ...

    def unmap(self, addr: int, size: int) -> None:
        """Take it away again."""
        ...

    def total_bytes(self) -> int:
        """The device's memory."""
        ...

    def free_bytes(self) -> int:
        """What of it is not taken."""
        ...


class AddressSpace:
    """A device with so many bytes (None: more than anybody asks for). The lowest address that is free is taken."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = 1 << 44 if capacity is None else capacity
        self.used = 0
        self._gaps = [(_FIRST, _FIRST + (1 << 46))]
        self._next_virtual = _VIRTUAL

    def allocate(self, size: int, stream: int, small: bool) -> int | None:
        """The lowest stretch that is large enough, aligned to 2 MiB."""
        if self.used + size > self.capacity:
            return None
        whole = -(-size // _ALIGNMENT) * _ALIGNMENT
        for i, (start, end) in enumerate(self._gaps):
            if end - start >= whole:
                self._gaps[i : i + 1] = [(start + whole, end)] if start + whole < end else []
                self.used += size
                return start
        return None

    def release(self, addr: int, size: int) -> None:
        """The stretch joins its free neighbours."""
        self.used -= size
        start, end = addr, addr + -(-size // _ALIGNMENT) * _ALIGNMENT
        i = bisect_left(self._gaps, (start, end))
        if i < len(self._gaps) and self._gaps[i][0] == end:
            end = self._gaps.pop(i)[1]
        if i and self._gaps[i - 1][1] == start:
            start = self._gaps.pop(i - 1)[0]
        insort(self._gaps, (start, end))

    def reserve(self, size: int, stream: int, small: bool) -> int:
        """Ranges follow each other; none is used twice."""
        addr = self._next_virtual
        self._next_virtual += -(-size // _ALIGNMENT) * _ALIGNMENT
        return addr

    def unreserve(self, addr: int, size: int) -> None:
        """Nothing to do: ranges are not used twice."""

    def map(self, addr: int, size: int) -> bool:
        """Memory is memory, wherever it is mapped."""
        if self.used + size > self.capacity:
            return False
        self.used += size
        return True

    def unmap(self, addr: int, size: int) -> None:
        """The memory is free again."""
        self.used -= size

    def total_bytes(self) -> int:
        """The capacity."""
        return self.capacity

    def free_bytes(self) -> int:
        """The capacity less segments and mapped pages."""
        return self.capacity - self.used
