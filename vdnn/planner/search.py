"""Look for the fastest step that fits: rounded linear programs as starts, then changes that the simulator approves.

    seed       solve the program of `bound` for what the engine can do, with the link as it is and slower; compute
               again what it computes again by more than half, in runs no longer than a cap; offload what it offloads
    fewest     of a list of storages the shortest head that makes the step fit, by bisection
    improve    where compute waits for a copy: keep that storage, compute it again, or move another in its place

A judgement is a schedule, its requested bytes and its simulated time, some milliseconds; before anything is accepted
the allocator's model must say that it fits. How much is tried depends on the sizes of the step alone, never on the
clock: the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from vdnn.analysis.chains import Chain, chains
from vdnn.analysis.recomputing import recompute
from vdnn.costs import times_with
from vdnn.planner.bound import pieces, time_bound
from vdnn.planner.schedule import Parcel, Schedule, Step
from vdnn.policies import Options
from vdnn.policies.candidates import survey
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Trace

__all__ = ["Found", "Search", "Seed"]

# Links that the seeds' programs are told, in hundredths of the real one: whole copies and program order waste some.
_LINKS = (100, 60)
# Bytes that may come to life at once when a run of feature maps is computed again, in 2^-n-ths of all that is movable.
_RUNS = (40, 5, 0)
_BREAKPOINTS = 450  # of a seed's program: coarser than the bound's
_AHEAD = (0, 1, 3)
_REFITS = 5


@dataclass(frozen=True, slots=True)
class Found:
    """One way to run the step: what is dropped and what is offloaded, and what the simulator says of it."""

    dropped: frozenset[int]
    parcels: tuple[Parcel, ...]
    schedule: Schedule
    time_ns: int
    requested_bytes: int
    target_bytes: int
    ahead: int

    @property
    def rank(self) -> tuple[int, int]:
        """What comes first is better: less time, then fewer bytes moved."""
        return self.time_ns, self.schedule.moved_bytes


@dataclass(frozen=True, slots=True)
class Seed:
    """A start: what is computed again, and what a program would offload by how much."""

    found: Found
    shares: dict[int, float]


class Search:
    """A search on one step for one machine; keeps the steps that it rewrote."""

    def __init__(self, trace: Trace, hardware: Hardware, options: Options) -> None:
        self.trace = trace
        self.hardware = hardware
        self.options = options
        self.op_ns = times_with(trace, hardware, {}, "")
        self.saved = survey(trace, options)
        self.movable = {item.storage: item for item in self.saved if item.movable}
        self.chains: dict[int, Chain] = {
            storage: chain for storage, chain in chains(trace, costly=True).items() if storage in self.movable
        }
        self.again_ns = {s: sum(self.op_ns[op] for op in chain.ops) for s, chain in self.chains.items()}
        self._pieces = [
            replace(piece, again=self.chains[piece.storage].ops if piece.storage in self.chains else None)
            for piece in pieces(trace)
            if piece.storage in self.movable
        ]
        self._steps: dict[frozenset[int], tuple[Step, dict[int, Parcel]]] = {}
        self.work = 0
        self.gave_up = 0

    # -- judging -----------------------------------------------------------------------------------

    def step(self, dropped: frozenset[int]) -> tuple[Step, dict[int, Parcel]]:
        """The step in which these are computed again, and what may be offloaded of it."""
        known = self._steps.get(dropped)
        if known is not None:
            return known
        self.work += 4 * len(self.trace.ops)
        if dropped:
            trace = recompute(self.trace, dropped, (), {s: self.chains[s] for s in dropped}, checked=False)
            made = Step(trace, self.hardware, times_with(trace, self.hardware, {}, ""))
            left = [i for i in survey(trace, self.options) if i.movable and i.storage < len(self.trace.storages)]
        else:
            made = Step(self.trace, self.hardware, self.op_ns)
            left = list(self.movable.values())
        parcels = {}
        for item in left:
            if item.storage not in dropped:
                parcel = made.parcel(item)
                if parcel is not None:
                    parcels[item.storage] = parcel
        if len(self._steps) > 64:
            self._steps.clear()
        self._steps[dropped] = made, parcels
        return made, parcels

    def judge(
        self, dropped: frozenset[int], parcels: Sequence[Parcel], target: int, ahead: int = 1, prefetch: bool = True
    ) -> Found:
        """Schedule and simulate."""
        return self._timed(*self._scheduled(dropped, parcels, target, ahead, prefetch))

    def _scheduled(
        self, dropped: frozenset[int], parcels: Sequence[Parcel], target: int, ahead: int, prefetch: bool = True
    ) -> tuple[Found, Step]:
        """Its memory is known, its time is not."""
        step, _ = self.step(dropped)
        self.work += 2 * len(step.trace.ops)
        schedule = step.schedule(parcels, target, ahead, prefetch)
        return Found(dropped, tuple(parcels), schedule, -1, step.peak_bytes(schedule.moves), target, ahead), step

    def _timed(self, found: Found, step: Step) -> Found:
        return replace(found, time_ns=step.time_ns(found.schedule.moves))

    def fits(self, found: Found, budget: int) -> bool:
        """Whether it fits, as the allocator's model has it."""
        if found.requested_bytes > budget:
            return False
        if self.trace.device == "cpu":
            return True
        self.work += 4 * len(self.trace.ops)
        return self.step(found.dropped)[0].fits(found.schedule.moves, budget)

    def fewest(self, dropped: frozenset[int], ordered: Sequence[Parcel], target: int, ahead: int) -> Found:
        """The shortest head of the list with which the step meets the target, if that were monotone; else all."""
        low, high = -1, len(ordered)
        best, step = self._scheduled(dropped, ordered, target, ahead)
        while high - low > 1 and best.requested_bytes <= target:
            middle = (low + high) // 2
            tried, _ = self._scheduled(dropped, ordered[:middle], target, ahead)
            if tried.requested_bytes <= target:
                high, best = middle, tried
            else:
                low = middle
        return self._timed(best, step)

    # -- seeds -------------------------------------------------------------------------------------

    def seeds(self, target: int, seconds: float) -> Iterator[Seed]:
        """Starts that meet the target, from programs that know different links, and from runs alone.

        A program that is not solved in time says nothing; `gave_up` counts them.
        """
        tried: set[frozenset[int]] = set()
        for link in _LINKS:
            machine = replace(
                self.hardware,
                d2h_bytes_per_s=max(1, self.hardware.d2h_bytes_per_s * link // 100),
                h2d_bytes_per_s=max(1, self.hardware.h2d_bytes_per_s * link // 100),
                duplex_bytes_per_s=max(1, self.hardware.duplex_bytes_per_s * link // 100),
            )
            shares = time_bound(
                self.trace, machine, self.op_ns, target, items=self._pieces, seconds=seconds, breakpoints=450
            )
            self.gave_up += not shares.solved
            wanted = {s for s, share in shares.again.items() if share > 0.5}
            yield from self._starts(wanted, shares.out, target, tried)
        yield from self._starts(set(self.chains), {}, target, tried)
        yield from self._starts({s for s in self.chains if self._cheap(s)}, {}, target, tried)
        yield from self._starts((), {}, target, tried)

    def _starts(
        self, wanted: Collection[int], shares: dict[int, float], target: int, tried: set[frozenset[int]]
    ) -> Iterator[Seed]:
        total = sum(item.nbytes for item in self.movable.values())
        for cap in _RUNS:
            dropped = self.cut(wanted, total >> cap)
            if dropped not in tried:
                tried.add(dropped)
                found = self.fill(dropped, shares, target)
                if found.requested_bytes <= target:
                    yield Seed(found, shares)

    def _cheap(self, storage: int) -> bool:
        """Whether it takes less time to compute again than to fetch."""
        return self.again_ns[storage] * self.hardware.h2d_bytes_per_s < self.movable[storage].nbytes * 10**9

    def refit(self, seed: Seed, budget: int) -> Found | None:
        """The seed at the largest target, of those tried, at which the allocator's model says that it fits."""
        low, high = budget * 11 // 16, budget
        target, best = seed.found.target_bytes, None
        for _ in range(_REFITS):
            found = (
                seed.found if target == seed.found.target_bytes else self.fill(seed.found.dropped, seed.shares, target)
            )
            if found.requested_bytes <= target and self.fits(found, budget):
                low = target
                if best is None or found.rank < best.rank:
                    best = found
            else:
                high = target
            target = (low + high) // 2
        return best

    def least(self) -> list[Found]:
        """Ways to run with the least memory, the least first: all that can goes at once, and comes back on demand."""
        total = sum(item.nbytes for item in self.movable.values())
        sets = [frozenset[int](), *(self.cut(self.chains, total >> cap) for cap in _RUNS)]
        sets.append(self.cut({s for s in self.chains if self._cheap(s)}, total >> 5))
        found = []
        for dropped in dict.fromkeys(sets):
            _, parcels = self.step(dropped)
            away = list(parcels.values())
            found.append(self.judge(dropped, away, 0, 0, prefetch=False))
            # as little is requested with prefetches where there is room, and the allocator may make more of that
            found.append(self.judge(dropped, away, found[-1].requested_bytes, 0))
        return sorted(found, key=lambda one: (one.requested_bytes, one.time_ns))

    def cut(self, wanted: Collection[int], cap: int) -> frozenset[int]:
        """What is computed again, without those at which a run of it would grow beyond the cap in bytes.

        A run is made at once when backward asks for its end, and lives until each of its parts was used.
        """
        lengths: dict[int, int] = {}
        storages = self.trace.storages
        for s in sorted(wanted, key=lambda s: storages[s].alloc):
            before = lengths.get(self.trace.saved[self.chains[s].source].storage, 0)
            if not before or before + storages[s].nbytes <= cap:
                lengths[s] = before + storages[s].nbytes
        return frozenset(lengths)

    def fill(self, dropped: frozenset[int], shares: dict[int, float], target: int) -> Found:
        """Offload what the program does, then what was saved first, as far as it takes."""
        _, parcels = self.step(dropped)
        ordered = sorted(parcels.values(), key=lambda p: (shares.get(p.item.storage, 0.0) < 0.5, p.out))
        return self.fewest(dropped, ordered, target, 1)

    # -- local search ------------------------------------------------------------------------------

    def improve(self, start: Found, budget: int, work: int) -> Found:
        """Changes of one storage at a time that make a fitting step faster, until none does or enough was tried."""
        best = start
        limit = self.work + work
        for ahead in _AHEAD:
            best = self._better(best, self.judge(best.dropped, best.parcels, best.target_bytes, ahead), budget)
        failed: set[tuple[str, int, int]] = set()
        going = True
        while going:
            going = False
            for change in self._changes(best):
                if self.work >= limit:
                    return best
                if change in failed:
                    continue
                tried = self._changed(best, change)
                if tried is not None and self._better(best, tried, budget) is tried:
                    best, going = tried, True
                    break
                failed.add(change)
        return best

    def _better(self, best: Found, tried: Found, budget: int) -> Found:
        return tried if tried.rank < best.rank and self.fits(tried, budget) else best

    def _changes(self, best: Found) -> list[tuple[str, int, int]]:
        """What might help, the most promising first: (kind, storage, other)."""
        _, parcels = self.step(best.dropped)
        out = {parcel.item.storage for parcel in best.parcels}
        stalls = best.schedule.stalls
        waited = sorted((s for s in stalls if stalls[s] > 0), key=lambda s: -stalls[s])
        others = sorted((p for s, p in parcels.items() if s not in out), key=lambda p: p.out)
        size_of = self.trace.storages
        found: list[tuple[str, int, int]] = [("target", 0, up) for up in (64, 16)]
        cheap = sorted(
            (s for s in self.chains if s in out), key=lambda s: self.again_ns[s] / self.trace.storages[s].nbytes
        )
        for s in waited[:12]:
            found.append(("keep", s, -1))
            if s in self.chains:
                found.append(("drop", s, -1))
        for s in cheap[:24]:
            found.append(("drop", s, -1))
        kept = [s for s in self.chains if s not in out and s not in best.dropped and s in parcels]
        kept.sort(key=lambda s: self.again_ns[s] / size_of[s].nbytes)
        for s in kept[:24]:
            found.append(("drop", s, -1))
        for s in waited[:6]:
            size = size_of[s].nbytes
            near = sorted(others, key=lambda p: (abs(p.item.nbytes - size), p.out))[:4]
            found += [("swap", s, p.item.storage) for p in near]
        for parcel in sorted(best.parcels, key=lambda p: (-p.item.nbytes, p.out)):
            found.append(("keep", parcel.item.storage, -1))
        dear = sorted(best.dropped, key=lambda s: -self.again_ns[s])
        for s in dear[:24]:
            found.append(("undrop", s, -1))
        return list(dict.fromkeys(found))

    def _changed(self, best: Found, change: tuple[str, int, int]) -> Found | None:
        kind, storage, other = change
        if kind == "target":
            target = best.target_bytes + best.target_bytes // other
            return self.judge(best.dropped, best.parcels, target, best.ahead)
        out = [parcel.item.storage for parcel in best.parcels]
        dropped = best.dropped
        if kind == "drop":
            dropped = dropped | {storage}
        elif kind == "undrop":
            dropped = dropped - {storage}
        _, parcels = self.step(dropped)
        names = [s for s in out if s != storage and s in parcels]
        if kind == "swap" and other in parcels:
            names.append(other)
        chosen = [parcels[s] for s in names]
        tried = self.judge(dropped, chosen, best.target_bytes, best.ahead)
        if kind == "undrop" and tried.requested_bytes > best.target_bytes and storage in parcels:
            tried = self.judge(dropped, [*chosen, parcels[storage]], best.target_bytes, best.ahead)
        if tried.requested_bytes > best.target_bytes:
            return None
        return self._shed(tried) if kind == "drop" else tried

    def _shed(self, found: Found) -> Found:
        """Without the offloads that are waited for and not needed any more."""
        best = found
        stalls = found.schedule.stalls
        for s in sorted((s for s in stalls if stalls[s] > 0), key=lambda s: -stalls[s])[:3]:
            rest = [p for p in best.parcels if p.item.storage != s]
            tried = self.judge(best.dropped, rest, best.target_bytes, best.ahead)
            if tried.requested_bytes <= best.target_bytes and tried.time_ns < best.time_ns:
                best = tried
        return best
