"""When what is offloaded leaves and comes back: as late and as early as memory allows, with the link in mind.

    forward    a copy out starts at the pack (the engine's rule). Before an op that would go over the target, the
               oldest copies are released, at the last point there is: compute waits for a copy only if it must
    backward   fetches go in the order of need, each at the first point from which its buffer fits until its need,
               but no earlier than the link can carry it without a stall, and than the link is free

The clock is the step's without a plan, moved by the stalls so far; what is exact is the simulator's to say.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import Moment, Move, Points, extent
from vdnn.costs import host_times
from vdnn.policies.candidates import Saved, inside
from vdnn.policies.plans import covers_half
from vdnn.sim.allocator_step import fits
from vdnn.sim.run import Pace, clock, run
from vdnn.sim.workspaces import with_libraries
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Offload
from vdnn.values.trace import Trace

__all__ = ["Parcel", "Schedule", "Step"]


@dataclass(frozen=True, slots=True)
class Parcel:
    """One storage that may be offloaded, as the scheduler sees it: `views` are (saved tensor, bytes, out, need).

    Of backward's points, `place` is the one where it is needed, and `back` the first at that position.
    """

    item: Saved
    whole: bool
    moved: int
    out: Moment
    need: Moment
    free_from: Moment
    views: tuple[tuple[int, int, Moment, Moment | None], ...]
    place: int
    back: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """What to do with each storage, as the plan's actions and as moves.

    `over_bytes` is what the target was missed by; `stalls` is about how long compute waits for each storage.
    """

    actions: dict[int, Offload]
    moves: tuple[Move, ...]
    over_bytes: int
    stalls: dict[int, int]

    @property
    def moved_bytes(self) -> int:
        """Bytes that go out."""
        return sum(move.nbytes for move in self.moves)


class Step:
    """A step whose offloads are to be scheduled: its points, its memory and its clock, worked out once."""

    def __init__(self, trace: Trace, hardware: Hardware, op_ns: Sequence[int]) -> None:
        self.trace = trace
        self.hardware = hardware
        self.op_ns = op_ns
        self.live = requested(trace)
        self.clock = clock(trace, op_ns, hardware)
        self._pace = Pace(op_ns, host_times(trace, hardware))
        self._libraries: Trace | None = None
        self.points = Points(trace)
        self.forward_end = trace.forward_end
        packs = inside(trace)
        forward = [(self.points.pack(i), f"pack {self.points.names[i]}") for i in packs]
        forward += [(self.points.end(i), f"end {call.fqn}#{call.call}") for i, call in enumerate(trace.modules)]
        self._forward = sorted(forward)
        self._forward_at = [moment[0] for moment, _ in self._forward]
        asked = [(moment, i) for i in packs if (moment := self.points.unpack(i)) is not None]
        self._backward = sorted((moment, f"unpack {self.points.names[i]}") for moment, i in asked)
        self._backward_at = [moment[0] for moment, _ in self._backward]
        # the most that lives from one point of backward to the next
        self._between = [
            max(self.live[begin:end], default=0) for begin, end in pairwise([*self._backward_at, len(trace.ops)])
        ]
        roots = [call for call in trace.modules if call.parent < 0]
        self._last = f"end {roots[-1].fqn}#{roots[-1].call}" if roots else ""

    def parcel(self, item: Saved) -> Parcel | None:
        """A storage as the scheduler sees it; None if no point lies between its last pack and its need."""
        points, s = self.points, self.trace.storages[item.storage]
        whole = covers_half(self.trace, item.storage, item.tensors)
        groups = {(0, item.nbytes): list(item.tensors)}
        if not whole:
            groups = {}
            for i in item.tensors:
                groups.setdefault(extent(self.trace.saved[i]), []).append(i)
        views = []
        for (_, nbytes), group in groups.items():
            asked = [moment for moment in map(points.unpack, group) if moment is not None]
            views.append((group[0], nbytes, min(points.pack(i) for i in group), min(asked) if asked else None))
        needs = [need for *_, need in views if need is not None]
        free_from: Moment = max((s.release, 0), max(points.pack(i) for i in item.tensors))
        if not needs or free_from[0] >= min(needs)[0] or free_from > self._forward[-1][0]:
            return None
        out = min(view[2] for view in views)
        need = min(needs)
        place, back = bisect_left(self._backward, (need, "")), bisect_left(self._backward_at, need[0])
        return Parcel(item, whole, sum(view[1] for view in views), out, need, free_from, tuple(views), place, back)

    def time_ns(self, moves: Sequence[Move]) -> int:
        """How long the step takes under these moves."""
        return run(self.trace, moves, self.op_ns, self.hardware, pace=self._pace).total_ns

    def fits(self, moves: Sequence[Move], capacity: int) -> bool:
        """Whether the allocator's model runs it in so much memory."""
        if self._libraries is None:
            self._libraries = with_libraries(self.trace, self.hardware)
        return fits(self._libraries, moves, capacity)

    def peak_bytes(self, moves: Sequence[Move]) -> int:
        """The most that is requested under these moves: `liveness.requested`, from what is known of the step."""
        change = [0] * (len(self.live) + 1)
        seen: set[int] = set()
        for move in moves:
            s = self.trace.storages[move.storage]
            gone = min(max(move.release[0], s.release), s.free)
            if move.storage not in seen:  # a storage of which views move by themselves goes once
                seen.add(move.storage)
                change[gone] -= s.nbytes
                change[s.free] += s.nbytes
            if move.fetch is not None and move.fetch[0] < s.free:
                change[move.fetch[0]] += move.nbytes
                change[s.free] -= move.nbytes
        return max((a + b for a, b in zip(self.live, accumulate(change), strict=False)), default=0)

    def schedule(self, parcels: Sequence[Parcel], target_bytes: int, ahead: int, prefetch: bool = True) -> Schedule:
        """Release and fetch points for these storages, so that no more than the target lives wherever that can be.

        Args:
            ahead: copies that may wait for the link with their buffer held, besides the one under way.
            prefetch: without it everything comes back on demand: the least memory.
        """
        ordered = sorted(parcels, key=lambda parcel: parcel.out)
        stalls: dict[int, int] = {}
        releases, shift, over = self._releases(ordered, target_bytes, prefetch, stalls)
        fetches, more = self._fetches(ordered, target_bytes, ahead, shift, stalls) if prefetch else ({}, 0)
        actions: dict[int, Offload] = {}
        moves: list[Move] = []
        for entry, parcel in enumerate(ordered):
            storage = parcel.item.storage
            release, text = releases[storage]
            fetch = fetches.get(storage)
            actions[storage] = Offload(text, fetch[1] if fetch else "", whole=parcel.whole)
            for saved, nbytes, out, need in parcel.views:
                on_demand = need is not None and (fetch is None or fetch[0] >= need)
                at = need if on_demand else fetch[0] if fetch else None
                free = self.trace.storages[storage].free
                lives = (free, max(free, out[0] + 1))
                moves.append(Move(storage, saved, nbytes, entry, out, release, at, on_demand, None, need, *lives))
        return Schedule(actions, tuple(moves), max(over, more), stalls)

    def _releases(
        self, ordered: Sequence[Parcel], target: int, late: bool, stalls: dict[int, int]
    ) -> tuple[dict[int, tuple[Moment, str]], int, int]:
        """The release of each; how much later than without a plan backward begins; and by how much it is over."""
        rate, latency = self.hardware.d2h_bytes_per_s, self.hardware.link_latency_ns
        found: dict[int, tuple[Moment, str]] = {}
        ends: dict[int, int] = {}
        waiting: deque[Parcel] = deque()
        coming = 0
        away = shift = over = link = 0
        end = self._forward[-1][0]

        def let_go(parcel: Parcel, point: tuple[Moment, str]) -> None:
            nonlocal away, shift
            found[parcel.item.storage] = point
            away += parcel.item.nbytes
            waits = max(0, ends[parcel.item.storage] - (self.clock[point[0][0]] + shift))
            stalls[parcel.item.storage] = waits
            shift += waits

        for p in range(min(self.forward_end, len(self.live))):
            while coming < len(ordered) and ordered[coming].out[0] <= p:
                parcel = ordered[coming]
                link = max(link, self.clock[parcel.out[0]] + shift) + latency + parcel.moved * 10**9 // rate
                ends[parcel.item.storage] = link
                waiting.append(parcel)
                coming += 1
            if self.live[p] - away <= target and late:
                continue
            here = bisect_right(self._forward_at, p) - 1
            if here < 0:
                continue
            point = self._forward[here]
            held = []
            while waiting and (self.live[p] - away > target or not late):
                parcel = waiting.popleft()
                if parcel.free_from <= point[0]:
                    let_go(parcel, point)
                else:
                    held.append(parcel)
            waiting.extendleft(reversed(held))
            over = max(over, self.live[p] - away - target)
        for parcel in ordered[coming:]:  # packed after the last op of forward
            link = max(link, self.clock[parcel.out[0]] + shift) + latency + parcel.moved * 10**9 // rate
            ends[parcel.item.storage] = link
            waiting.append(parcel)
        for parcel in waiting:
            let_go(
                parcel, self._forward[-1] if parcel.free_from > self.points.moment(self._last) else (end, self._last)
            )
        return found, shift, over

    def _fetches(
        self, ordered: Sequence[Parcel], target: int, ahead: int, shift: int, stalls: dict[int, int]
    ) -> tuple[dict[int, tuple[Moment, str]], int]:
        """Where each is fetched (not in it: on demand), and by how much it is over."""
        rate, latency = self.hardware.h2d_bytes_per_s, self.hardware.link_latency_ns
        queue = sorted((parcel for parcel in ordered), key=lambda parcel: parcel.need)
        at, n = self._backward_at, len(self._backward_at)
        if not n:
            return {}, 0
        change = [0] * (n + 1)
        for parcel in ordered:  # with everything away until its need
            change[0] += parcel.item.nbytes
            change[parcel.back] -= parcel.moved
        room = [target - most + away for most, away in zip(self._between, accumulate(change), strict=False)]
        takes = [latency + parcel.moved * 10**9 // rate for parcel in queue]
        starts = [0] * len(queue)  # the latest start without a stall, the link's other duties considered
        deadline = self.clock[-1] + shift
        for i in range(len(queue) - 1, -1, -1):
            deadline = min(deadline, self.clock[queue[i].need[0]] + shift) - takes[i]
            starts[i] = deadline
        found: dict[int, tuple[Moment, str]] = {}
        times = [self.clock[p] for p in at]
        last = 0
        free: deque[int] = deque([0] * (ahead + 1))  # when the link has carried the one `ahead` before
        link = 0
        for parcel, start, take in zip(queue, starts, takes, strict=True):
            moved, need, due = parcel.moved, parcel.place, self.clock[parcel.need[0]] + shift
            wanted = bisect_right(times, max(min(start, due), free[0]) - shift) - 1
            first = max(last, min(wanted, need))
            k = need
            # at the position of the need itself nothing can come earlier
            while k > first and room[k - 1] >= moved:
                k -= 1
                room[k] -= moved
            last = k
            if k < need:
                found[parcel.item.storage] = self._backward[k]
            link = max(link, times[min(k, n - 1)] + shift) + take
            waits = max(0, link - due)
            stalls[parcel.item.storage] = stalls.get(parcel.item.storage, 0) + waits
            shift += waits
            free.append(link)
            free.popleft()
        return found, max(0, -min(room))
