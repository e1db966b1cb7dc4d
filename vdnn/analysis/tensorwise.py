"""What hooks do that copy saved tensor by saved tensor, in program order: `save_on_cpu` and torchtune's.

    trips(points, copied, how)      one `Trip` a saved tensor: when it goes, when it comes back, when each buffer dies

Neither knows storages: a view is copied by itself, and what is saved twice is copied twice. The storage on the
device goes when the last of its saved tensors is let go of; each copy back has a buffer of its own, which lives until
the autograd node that asked for it has run. The trace does not say where a node ends: it is taken to end after the
last op that reads what it unpacked.

compute: the copy is a piece of the compute stream's own work, both ways.
side:    one stream for both directions. A pack lets go of what was packed `stash` or more packs before, when compute
         has waited for its copy; the first node of backward finds the rest in the stash, and lets go of it at its end.
         A copy back does not wait for compute where it stands, but for the end of the node before the last one:
         the host issues it as soon as it gets there, which is all the prefetch there is. What a node has got
         lives until the next node that gets something has run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from vdnn.values.plan import Copy
from vdnn.values.trace import Trace

if TYPE_CHECKING:
    from vdnn.analysis.moments import Moment, Points

__all__ = ["Trip", "node_ends", "trips"]


class Trip(NamedTuple):
    """One saved tensor's way out and back.

    Compute waits for the copy out at `release`. `fetch` is None for what does not come back. The buffer of the copy
    back goes at position `until`, the host's at `host_until`. `behind` is the position up to which compute must have
    come before the copy back may start (-1: none).
    """

    saved: int
    out: Moment
    release: Moment
    fetch: Moment | None
    until: int
    host_until: int
    behind: int


def node_ends(trace: Trace) -> dict[tuple[int, str], int]:
    """Where each autograd node ends that unpacks something, by the position at which it unpacks and its name."""
    asked: dict[tuple[int, str], set[int]] = {}
    for t in trace.saved:
        for position in t.unpacked_at:
            asked.setdefault((position, t.node), set()).add(t.storage)
    starts = sorted({position for position, _ in asked})
    following = dict(zip(starts, [*starts[1:], len(trace.ops)], strict=True))
    ends = {}
    for (position, node), storages in asked.items():
        last = position
        for i in range(position, following[position]):
            if not storages.isdisjoint(trace.ops[i].reads):
                last = i
        ends[position, node] = min(last + 1, len(trace.ops))
    return ends


def trips(points: Points, copied: Collection[int], how: Copy) -> list[Trip]:
    """The trips of these saved tensors, in pack order."""
    ends = node_ends(points.trace)
    if how.stream == "side":
        return _Stash(points, copied, how.stash, ends).trips()
    trace, found = points.trace, []
    for i in sorted(copied):
        t, pack = trace.saved[i], points.pack(i)
        until = max((ends[position, t.node] for position in t.unpacked_at), default=0)
        host_until = max(until or trace.backward_end, pack[0] + 1)
        found.append(Trip(i, pack, pack, points.unpack(i), until, host_until, -1))
    return found


class _Stash:
    """torchtune's bookkeeping, played through the step."""

    def __init__(self, points: Points, copied: Collection[int], size: int, ends: dict[tuple[int, str], int]) -> None:
        self.points = points
        self.copied = set(copied)
        self.size = size
        self.ends = ends
        self.over = points.trace.backward_end
        self.numbers: dict[int, int] = {}  # tensor → its number among all that were packed
        self.waiting: list[int] = []  # packed, and still held by the stash
        self.release: dict[int, Moment] = {}
        self.fetch: dict[int, Moment] = {}
        self.until: dict[int, int] = {}
        self.behind: dict[int, int] = {}
        self.asked: dict[int, int] = {}  # tensor → position of its unpack
        self.node: tuple[int, str] | None = None
        self.restored: list[int] = []  # held for the node that runs, and for the one before
        self.previous: list[int] = []  # those that go when it has run
        self.node_end: dict[int, int] = {}  # of the node that a restored tensor is for
        self.fence = -1

    def trips(self) -> list[Trip]:
        points, saved = self.points, self.points.trace.saved
        events = [(points.pack(i), False, i) for i, t in enumerate(saved) if t.module >= 0]
        events += [(moment, True, i) for i in self.copied if (moment := points.unpack(i)) is not None]
        for moment, back, i in sorted(events):
            if self.node is not None and moment[0] >= self.ends[self.node]:
                self._after_node()
            if back:
                self._unpack(i, moment)
            else:
                self._pack(i, moment)
        self._after_node()
        found = []
        for i in sorted(self.copied):
            pack = points.pack(i)
            release = self.release.get(i, (max(self.over, pack[0]), -1))
            host_until = max(self.asked.get(i, self.over), pack[0] + 1)
            until = self.until.get(i, self.over)
            found.append(Trip(i, pack, release, self.fetch.get(i), until, host_until, self.behind.get(i, -1)))
        return found

    def _pack(self, i: int, moment: Moment) -> None:
        number = self.numbers[i] = len(self.numbers)
        if i not in self.copied:
            return
        while self.waiting and self.numbers[self.waiting[0]] <= number - self.size:
            self.release[self.waiting.pop(0)] = moment
        self.waiting.append(i)

    def _unpack(self, i: int, moment: Moment) -> None:
        node = (moment[0], self.points.trace.saved[i].node)
        if node != self.node:
            self._after_node()
            self.node, self.previous = node, list(self.restored)
        self.asked[i] = moment[0]
        if i not in self.waiting:
            self.fetch[i] = moment
            self.behind[i] = self.fence
            self.node_end[i] = self.ends[node]
            self.restored.append(i)

    def _after_node(self) -> None:
        """The node has run: the stash of forward is over, and what the node before had got goes."""
        if self.node is None:
            return
        end = self.ends[self.node]
        for i in self.waiting:
            self.release[i] = (end, -1)
        self.waiting.clear()
        for i in self.previous:
            self.until[i] = end
            self.restored.remove(i)
            self.fence = max(self.fence, self.node_end[i])
        self.node, self.previous = None, []
