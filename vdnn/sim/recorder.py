"""Writes down what the simulation does, as a `Timeline`. Only made when one is asked for.

Device memory is told in program order, as the allocator sees it: at a position what is freed there comes
first, then what the plan's actions take and give, then what the next op makes. So the largest prefix sum of
the events, on top of what was resident, is the requested peak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from vdnn.analysis.dataparallel import Bucket
from vdnn.analysis.moments import Move, Points, released_at
from vdnn.sim.copies import CopyStreams
from vdnn.sim.program import FETCH, OUT, RELEASE
from vdnn.values.timeline import STREAMS, MemoryEvent, Span, Stall, Timeline
from vdnn.values.trace import Trace

__all__ = ["Cause", "Recorder"]

Cause = Literal["release", "prefetch", "fetch", "layer"]
_Place = Literal["device", "host"]


class Recorder:
    """Collects spans, stalls and memory events of one run."""

    def __init__(self, trace: Trace, moves: Sequence[Move]) -> None:
        self._trace = trace
        self._moves = moves
        points = Points(trace)
        self._names = [str(points.names[move.saved]) for move in moves]
        self._spans: list[Span] = []
        self._stalls: list[Stall] = []
        self._memory: list[MemoryEvent] = []
        n = len(trace.ops)
        self._allocs: list[list[tuple[int, str]]] = [[] for _ in range(n + 1)]
        self._frees: list[list[tuple[int, str, _Place]]] = [[] for _ in range(n + 2)]
        self._releases = Counter(move.storage for move in moves if move.frees)  # releases still to come, by storage
        self._goes_at_release: set[int] = set()
        release_of = released_at(moves)
        for i, s in enumerate(trace.storages):
            if s.alloc >= 0:
                self._allocs[s.alloc].append((s.nbytes, s.category))
            gone = min(max(release_of.get(i, s.free), s.release), s.free) if i in release_of else s.free
            if i in release_of and gone == release_of[i]:
                self._goes_at_release.add(i)
            else:
                self._frees[gone].append((s.nbytes, s.category, "device"))
        for move in moves:
            s = trace.storages[move.storage]
            self._frees[move.host_until].append((move.nbytes, s.category, "host"))
            if move.fetch is not None and move.fetch[0] < move.until:
                self._frees[move.until].append((move.nbytes, s.category, "device"))

    def reach(self, position: int, now: int) -> None:
        """What nobody holds any more at this position."""
        for nbytes, category, where in self._frees[position]:
            self._event(now, position, -nbytes, category, where)

    def op(self, op: int, issued: int, ready: int, free: int, start: int, end: int) -> None:
        """Op `op`: the host works on it from `issued` to `ready`, compute is free at `free` and runs it."""
        what = self._trace.ops[op]
        self._spans.append(Span("host", what.name, what.phase, issued, ready, 0))
        if start > free:
            self._stalls.append(Stall("compute", "launch", what.name, free, start))
        for nbytes, category in self._allocs[op]:
            self._event(start, op, nbytes, category, "device")
        self._event(start, op, what.workspace_bytes, "temporary", "device")
        if end > start:
            self._spans.append(Span("compute", what.name, what.phase, start, end, what.read_bytes + what.written_bytes))
        self._event(end, op + 1, -what.workspace_bytes, "temporary", "device")
        self.reach(op + 1, end)

    def wait(self, move: int, cause: Cause, free: int, waiting: int, end: int) -> None:
        """Compute waited for a copy, from `waiting` to `end`; from `free` to `waiting` it waited for the host."""
        if waiting > free:
            self._stalls.append(Stall("compute", "launch", self._names[move], free, waiting))
        if end > waiting:
            self._stalls.append(Stall("compute", cause, self._names[move], waiting, end))

    def action(self, index: int, kind: int, position: int, now: int) -> None:
        """What an action does to memory."""
        move = self._moves[index]
        s = self._trace.storages[move.storage]
        if kind == OUT:
            self._event(now, position, move.nbytes, s.category, "host")
        elif kind == FETCH and position < move.until:
            self._event(now, position, move.nbytes, s.category, "device")
        elif kind == RELEASE and move.frees:
            self._releases[move.storage] -= 1
            if move.storage in self._goes_at_release and not self._releases[move.storage]:
                self._event(now, position, -s.nbytes, s.category, "device")

    def copies(self, copies: CopyStreams) -> None:
        """The spans of all copies."""
        for i, (move, name) in enumerate(zip(self._moves, self._names, strict=True)):
            self._spans.append(Span("offload", name, "forward", copies.start[2 * i], copies.end[2 * i], move.nbytes))
            if move.fetch is not None:
                back = 2 * i + 1
                self._spans.append(
                    Span("prefetch", name, "backward", copies.start[back], copies.end[back], move.nbytes)
                )

    def wait_sum(self, bucket: int, free: int, end: int) -> None:
        """Compute waited for the sum of a bucket."""
        self._stalls.append(Stall("compute", "all-reduce", f"bucket {bucket}", free, end))

    def sums(self, copies: CopyStreams, first: int, buckets: Sequence[Bucket]) -> None:
        """The spans of all all-reduces, which are numbered from `first` on."""
        for i, bucket in enumerate(buckets):
            begin, end = copies.start[first + i], copies.end[first + i]
            self._spans.append(Span("communication", f"bucket {i}", "backward", begin, end, bucket.nbytes))

    def timeline(self) -> Timeline:
        """Everything, in order of time."""
        resident: Counter[str] = Counter()
        for s in self._trace.storages:
            if s.alloc < 0:
                resident[s.category] += s.nbytes
        stream = {name: i for i, name in enumerate(STREAMS)}
        self._spans.sort(key=lambda span: (span.start_ns, stream[span.stream], span.end_ns))
        return Timeline(tuple(self._spans), tuple(self._stalls), tuple(self._memory), tuple(sorted(resident.items())))

    def _event(self, now: int, position: int, nbytes: int, category: str, where: _Place) -> None:
        if nbytes:
            self._memory.append(MemoryEvent(now, position, nbytes, category, where))
