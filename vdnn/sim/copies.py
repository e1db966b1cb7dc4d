"""The offload and the prefetch stream, the stream of all-reduces, and the link that they share.

    submit(copy, way, nbytes, ready_ns, after)   in stream order; starts when the stream is free, `ready_ns`
                                                 has passed and the copy `after` has ended
    end_of(copy)                                 runs the clock until that copy has ended

A copy takes the link's latency, then its bytes at the link's rate. While both ways carry bytes, each slows in
proportion, so that together they carry `duplex_bytes_per_s`; the end of a running copy is then worked out
again. A ring of all-reduces goes both ways at once: where it uses the same link, each who is on it has half of
that rate while others are. Work left is kept as bytes × 10⁹, a whole number that shrinks by rate × ns: nothing
is rounded but the end of a copy (up).

The clock is a heap of (time, priority, sequence): equal times resolve the same way in every run. It may lag
behind the compute stream, never run ahead of it: `end_of` is called when compute waits, and whatever compute
submits later starts later than that wait ends.
"""

from __future__ import annotations

import heapq

from vdnn.sim.allreduce import Ring
from vdnn.values.hardware import Hardware

__all__ = ["BACK", "OUT_WAY", "REDUCE", "CopyStreams"]

OUT_WAY, BACK, REDUCE = range(3)
_START, _TRANSFER, _END = 2, 1, 0  # the kind of an event is its priority: ends come before starts


class CopyStreams:
    """Two streams of copies, out (D2H) and back (H2D), over one link, and one of all-reduces over `ring`.

    Copies and all-reduces are numbered by the caller.
    """

    def __init__(self, hardware: Hardware, copies: int, ring: Ring | None = None) -> None:
        d2h, h2d, both = hardware.d2h_bytes_per_s, hardware.h2d_bytes_per_s, hardware.duplex_bytes_per_s
        rate = ring.bytes_per_s if ring is not None else 0
        self._alone = (d2h, h2d, rate)
        together = d2h + h2d
        self._shared = self._alone
        if both < together:
            self._shared = (max(1, d2h * both // together), max(1, h2d * both // together), rate)
        self._halved = (max(1, self._shared[0] // 2), max(1, self._shared[1] // 2), max(1, rate // 2))
        self._ways = (OUT_WAY, BACK) if ring is None else (OUT_WAY, BACK, REDUCE)
        self._ring_on_link = ring is not None and ring.on_link
        self._latency = (hardware.link_latency_ns, hardware.link_latency_ns, 0)
        self.start = [-1] * copies
        self.end = [-1] * copies
        self._nbytes = [0] * copies
        self._ready = [0] * copies
        self._after = [-1] * copies
        self._queues: tuple[list[int], ...] = ([], [], [])
        self._heads = [0, 0, 0]
        self._scheduled = [False, False, False]  # the head of the queue is running, or its start is on the heap
        self._work = [-1, -1, -1]  # of the copy that is on the link; -1: none
        self._since = [0, 0, 0]
        self._rate = [0, 0, 0]
        self._version = [0, 0, 0]
        self._heap: list[tuple[int, int, int, int, int]] = []
        self._sequence = 0
        self._now = 0
        self.events = 0

    def submit(self, copy: int, way: int, nbytes: int, ready_ns: int, after: int = -1) -> None:
        """Put a copy at the end of its stream."""
        self._nbytes[copy] = nbytes
        self._ready[copy] = ready_ns
        self._after[copy] = after
        self._queues[way].append(copy)
        self._schedule(way)

    def end_of(self, copy: int) -> int:
        """When the copy ends."""
        while self.end[copy] < 0:
            self._step()
        return self.end[copy]

    def drain(self) -> int:
        """When the last copy ends."""
        while self._heap:
            self._step()
        return max(self.end, default=0)

    def _push(self, time: int, kind: int, way: int, version: int) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (time, kind, self._sequence, way, version))

    def _schedule(self, way: int) -> None:
        """Put the start of the stream's next copy on the heap, if it is known when that is."""
        queue = self._queues[way]
        if self._scheduled[way] or self._heads[way] == len(queue):
            return
        copy = queue[self._heads[way]]
        after = self._after[copy]
        if after >= 0 and self.end[after] < 0:
            return  # the end of `after` looks again
        self._scheduled[way] = True
        start = max(self._now, self._ready[copy])
        self.start[copy] = start
        self._push(start, _START, way, 0)

    def _step(self) -> None:
        time, kind, _, way, version = heapq.heappop(self._heap)
        if kind == _END and version != self._version[way]:
            return  # the rate has changed since: another end is on the heap
        self.events += 1
        self._now = time
        if kind == _START:
            self._push(time + self._latency[way], _TRANSFER, way, 0)
        elif kind == _TRANSFER:
            self._work[way] = self._nbytes[self._queues[way][self._heads[way]]] * 10**9
            self._share(time)
        else:
            self.end[self._queues[way][self._heads[way]]] = time
            self._work[way] = -1
            self._heads[way] += 1
            self._scheduled[way] = False
            self._share(time)
            self._schedule(way)
            if way != REDUCE:
                self._schedule(1 - way)

    def _share(self, time: int) -> None:
        """Who is on the link has changed: book the work done so far, and put new ends on the heap."""
        out, back, ring = self._work
        rates = self._shared if out >= 0 and back >= 0 else self._alone
        if ring >= 0 and self._ring_on_link and (out >= 0 or back >= 0):
            rates = self._halved
        for way in self._ways:
            if self._work[way] < 0:
                self._rate[way] = 0
            elif self._rate[way] != rates[way]:
                self._work[way] = max(0, self._work[way] - (time - self._since[way]) * self._rate[way])
                self._since[way] = time
                self._rate[way] = rates[way]
                self._version[way] += 1
                left_ns = (self._work[way] + rates[way] - 1) // rates[way]
                self._push(time + left_ns, _END, way, self._version[way])
