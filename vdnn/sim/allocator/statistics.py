"""The allocator's counts and sums, now and at their peaks, for one pool or all, named as torch names them.

`active` counts what is allocated and what other streams still use after it was freed. It equals `allocated` as
long as nothing waits, so its own peak is kept only while something does.
"""

from __future__ import annotations

__all__ = ["PoolStatistics", "torch_statistics"]

_KINDS = (
    "allocation",
    "allocated_bytes",
    "requested_bytes",
    "inactive_split",
    "inactive_split_bytes",
    "segment",
    "reserved_bytes",
    "active",
    "active_bytes",
)


class PoolStatistics:
    """Counts and bytes of one pool, or of all. Every `…_peak` is the largest value since the start."""

    __slots__ = (
        "_active_bytes_peak",
        "_active_peak",
        "allocated_bytes",
        "allocated_bytes_peak",
        "allocation",
        "allocation_peak",
        "awaiting",
        "awaiting_bytes",
        "inactive_split",
        "inactive_split_bytes",
        "inactive_split_bytes_peak",
        "inactive_split_peak",
        "requested_bytes",
        "requested_bytes_peak",
        "reserved_bytes",
        "reserved_bytes_peak",
        "segment",
        "segment_peak",
    )

    def __init__(self) -> None:
        self.allocation = self.allocation_peak = 0
        self.allocated_bytes = self.allocated_bytes_peak = 0
        self.requested_bytes = self.requested_bytes_peak = 0
        self.inactive_split = self.inactive_split_peak = 0
        self.inactive_split_bytes = self.inactive_split_bytes_peak = 0
        self.segment = self.segment_peak = 0
        self.reserved_bytes = self.reserved_bytes_peak = 0
        self.awaiting = self.awaiting_bytes = 0
        self._active_peak = self._active_bytes_peak = 0

    @property
    def active(self) -> int:
        """Blocks that are allocated, or freed and still used by another stream."""
        return self.allocation + self.awaiting

    @property
    def active_bytes(self) -> int:
        """Their bytes."""
        return self.allocated_bytes + self.awaiting_bytes

    @property
    def active_peak(self) -> int:
        """The most blocks that were active."""
        return max(self._active_peak, self.allocation_peak)

    @property
    def active_bytes_peak(self) -> int:
        """The most bytes that were active."""
        return max(self._active_bytes_peak, self.allocated_bytes_peak)

    def note_active(self) -> None:
        """Keep the peak of what is active; to be called after an allocation while something is awaited."""
        self._active_peak = max(self._active_peak, self.allocation + self.awaiting)
        self._active_bytes_peak = max(self._active_bytes_peak, self.allocated_bytes + self.awaiting_bytes)

    def split(self, blocks: int, nbytes: int) -> None:
        """Change what is free and split off, by a net number of blocks and of bytes."""
        self.inactive_split = now = self.inactive_split + blocks
        if now > self.inactive_split_peak:
            self.inactive_split_peak = now
        self.inactive_split_bytes = now = self.inactive_split_bytes + nbytes
        if now > self.inactive_split_bytes_peak:
            self.inactive_split_bytes_peak = now

    def reserve(self, segments: int, nbytes: int) -> None:
        """Take segments from CUDA, or give them back."""
        self.segment += segments
        self.segment_peak = max(self.segment_peak, self.segment)
        self.reserved_bytes += nbytes
        self.reserved_bytes_peak = max(self.reserved_bytes_peak, self.reserved_bytes)


def torch_statistics(pools: dict[str, PoolStatistics]) -> dict[str, int]:
    """`torch.cuda.memory_stats()`'s keys: "allocated_bytes.all.current", "segment.small_pool.peak" …"""
    return {
        f"{kind}.{pool}.{when}": getattr(numbers, kind if when == "current" else f"{kind}_peak")
        for pool, numbers in pools.items()
        for kind in _KINDS
        for when in ("current", "peak")
    }
