"""Look for the fastest step that fits: rounded linear programs as starts, then changes that the simulator approves.

    seed       solve the program of `bound` for what the engine can do, with the link as it is and slower; run those
               blocks again that it runs by more than half, compute again and encode what else it does, in runs no
               longer than a cap; offload what it offloads. And without a program: all blocks beside each other, and
               as few as it takes
    fewest     of a list of storages the shortest head that makes the step fit, by bisection
    starts     of the seeds the fastest that the allocator's model lets in

A judgement is a schedule, its requested bytes and its simulated time, some milliseconds; before anything is accepted
the allocator's model must say that it fits. How much is tried depends on the sizes of the step alone, never on the
clock: the same question has the same answer, unless the solver gives up a program, which the plan says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from vdnn.analysis.blocks import repeated
from vdnn.analysis.liveness import requested
from vdnn.planner.bound import time_bound
from vdnn.planner.choices import Choice, Choices
from vdnn.planner.pieces import Group, Piece, pieces
from vdnn.planner.schedule import Schedule
from vdnn.policies import Options
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Trace

__all__ = ["LONG", "Found", "Search", "Seed"]

# Links and memory that the seeds' programs are told, in hundredths of the real ones, and whether of blocks: whole
# copies and program order waste some of the link; runs and blocks come back at once, which takes memory that no
# program knows; and almost no link finds what to compute again instead.
_TOLD = (
    (100, 100, True), (100, 100, False), (2, 95, True), (60, 100, False), (60, 95, True), (100, 90, False),
    (2, 90, False), (100, 90, True),
)  # fmt: skip
# Bytes that may come to life at once when a run of feature maps is computed again, in 2^-n-ths of all that is movable.
_RUNS = (40, 5, 3, 0)
_LEAST_TOLD = 3  # programs that are solved in any case
_BREAKPOINTS = 450  # of a seed's program: coarser than the bound's
_REFITS = 4
_TIGHT = 4  # ways to need little memory that are tried at many targets
_FINER = 4  # blocks that may run again in smaller parts
LONG = 4000  # ops of a step of which fewer starts can be tried


@dataclass(frozen=True, slots=True)
class Found:
    """One way to run the step: what is changed in it and what is offloaded, and what the simulator says of it."""

    choice: Choice
    away: tuple[int, ...]
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
    """A start: what is changed in the step, and what a program would offload by how much."""

    found: Found
    shares: dict[int, float]


class Search:
    """A search on one step for one machine."""

    def __init__(self, trace: Trace, hardware: Hardware, options: Options) -> None:
        self.trace = trace
        self.hardware = hardware
        self.choices = Choices(trace, hardware, options)
        self.gave_up = 0
        self._work = 0

    @property
    def work(self) -> int:
        """Ops that were rewritten, scheduled and simulated."""
        return self._work + self.choices.work

    # -- judging -----------------------------------------------------------------------------------

    def judge(self, choice: Choice, away: Sequence[int], target: int, ahead: int = 1, prefetch: bool = True) -> Found:
        """Schedule and simulate; `away` are storages that are offloaded, as far as they can be."""
        there, schedule, most = self._scheduled(choice, away, target, ahead, prefetch)
        step = self.choices.made(choice).step
        self._work += len(step.trace.ops)
        return Found(choice, there, schedule, step.time_ns(schedule.moves), most, target, ahead)

    def _scheduled(
        self, choice: Choice, away: Sequence[int], target: int, ahead: int, prefetch: bool = True
    ) -> tuple[tuple[int, ...], Schedule, int]:
        """What can be offloaded of it, when, and the bytes that are requested then."""
        made = self.choices.made(choice)
        self._work += len(made.step.trace.ops)
        there = tuple(s for s in away if s in made.parcels)
        schedule = made.step.schedule([made.parcels[s] for s in there], target, ahead, prefetch)
        return there, schedule, made.step.peak_bytes(schedule.moves)

    def fits(self, found: Found, budget: int) -> bool:
        """Whether it fits, as the allocator's model has it."""
        if found.requested_bytes > budget:
            return False
        if self.trace.device == "cpu":
            return True
        step = self.choices.made(found.choice).step
        self._work += 4 * len(step.trace.ops)
        return step.fits(found.schedule.moves, budget)

    def fewest(self, choice: Choice, ordered: Sequence[int], target: int, ahead: int) -> Found:
        """The shortest head of the list with which the step meets the target, if that were monotone; else all."""
        low, high = -1, len(ordered)
        if self._scheduled(choice, ordered, target, ahead)[2] > target:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            if self._scheduled(choice, ordered[:middle], target, ahead)[2] <= target:
                high = middle
            else:
                low = middle
        return self.judge(choice, ordered[:high], target, ahead)

    # -- seeds -------------------------------------------------------------------------------------

    def seeds(self, target: int, most: int, seconds: float, work: int) -> Iterator[Seed]:
        """Starts that were made for the target and need no more than `most`.

        First as few of a model's repeated blocks as it takes. Then those of programs that know different links: one
        that is not solved in time says nothing, and `gave_up` counts it. Then, as long as `work` lasts, blocks beside
        each other, codes and runs alone.
        """
        choices, tried, limit = self.choices, set[Choice](), self.work + work
        worth = frozenset(s for s in choices.codes if self._worth(s))
        for chosen in self._few([block.call for block in repeated(self.trace)], worth, target):
            yield from self._starts(Choice(chosen, worth), {}, target, most, tried)
        items, ways = self._pieces()
        groups = self._groups()
        for number, (link, memory, blocks) in enumerate(_TOLD if groups else [told for told in _TOLD if not told[2]]):
            if number >= _LEAST_TOLD and self.work >= limit:
                break
            machine = replace(
                self.hardware,
                d2h_bytes_per_s=max(1, self.hardware.d2h_bytes_per_s * link // 100),
                h2d_bytes_per_s=max(1, self.hardware.h2d_bytes_per_s * link // 100),
                duplex_bytes_per_s=max(1, self.hardware.duplex_bytes_per_s * link // 100),
            )
            shares = time_bound(
                self.trace,
                machine,
                choices.op_ns,
                target * memory // 100,
                items=items,
                seconds=seconds,
                breakpoints=_BREAKPOINTS,
                groups=groups if blocks else (),
            )
            self.gave_up += not shares.solved
            again = {s for s, share in shares.again.items() if share > 0.5}
            coded = frozenset(s for s in again if ways.get(s) == "code")
            dropped = frozenset(s for s in again if ways.get(s) == "chain")
            for least in (0.5, 0.02):
                chosen = self._beside({c: b for c, b in shares.groups.items() if b > least})
                yield from self._starts(Choice(chosen, coded, dropped), shares.out, target, most, tried)
        cheap = frozenset(s for s in choices.chains if self._cheap(s))
        limit = max(limit, self.work + work // 2)
        for level in ([], *choices.levels()):
            for chosen in self._few(level, worth, target) if self.work < limit else ():
                for coded in (worth, frozenset[int]()):
                    for dropped in (frozenset(choices.chains), cheap, frozenset[int]()):
                        if self.work < limit:
                            yield from self._starts(Choice(chosen, coded, dropped), {}, target, most, tried)

    def _pieces(self) -> tuple[list[Piece], dict[int, str]]:
        """What a program may take away, each with the cheaper of the ways that make it again; and which that is."""
        choices = self.choices
        found, ways = [], {}
        for piece in pieces(self.trace):
            s = piece.storage
            if s not in choices.movable:
                continue
            chain = choices.chains.get(s)
            if s in choices.codes and (chain is None or choices.code_ns[s] < choices.again_ns[s]):
                ways[s] = "code"
                found.append(replace(piece, again=(), again_ns=choices.code_ns[s]))
            elif chain is not None:
                ways[s] = "chain"
                found.append(replace(piece, again=chain.ops))
            else:
                found.append(replace(piece, again=None))
        return found, ways

    def _groups(self) -> list[Group]:
        trace, found = self.trace, []
        for c, block in self.choices.blocks.items():
            need = min(trace.storages[s].need for s in block.dropped)
            end = trace.modules[c].forward_end
            found.append(Group(c, frozenset(block.dropped), end, need, self.choices.block_ns[c]))
        return found

    def _beside(self, shares: dict[int, float]) -> frozenset[int]:
        """Blocks of a program's answer that are beside each other: of nested ones those that it runs more of."""
        chosen = frozenset[int]()
        for c in sorted(shares, key=lambda c: (shares[c], c)):
            chosen = self.choices.beside(chosen, c)
        return chosen

    def _few(self, level: Sequence[int], coded: frozenset[int], target: int) -> Iterator[frozenset[int]]:
        """Of blocks beside each other as few as it takes, alone and with half of the work left to other actions."""
        level = [c for c in level if c in self.choices.blocks]
        low, high = 0, len(level)
        while high - low > 1:
            middle = (low + high) // 2
            choice = self.choices.settled(Choice(frozenset(level[:middle]), coded))
            if choice is not None and self._scheduled(choice, (), target, 1)[2] <= target:
                high = middle
            else:
                low = middle
        for count in dict.fromkeys((high, (high + 1) // 2)):
            yield frozenset(level[:count])

    def _starts(
        self, wanted: Choice, shares: dict[int, float], target: int, most: int, tried: set[Choice]
    ) -> Iterator[Seed]:
        total = sum(item.nbytes for item in self.choices.movable.values())
        for cap in _RUNS:
            base = self.choices.base(wanted.blocks)
            if base is None:
                return
            choice = self.choices.settled(
                replace(wanted, dropped=self.cut(wanted.dropped, total >> cap, wanted.blocks))
            )
            if choice is not None and choice not in tried:
                tried.add(choice)
                found = self.fill(choice, shares, target)
                if found.requested_bytes > target:
                    found = self.fill(choice, shares, most)
                if found.requested_bytes <= most:
                    yield Seed(found, shares)

    def _cheap(self, storage: int) -> bool:
        """Whether it takes less time to compute again than to fetch."""
        choices = self.choices
        return choices.again_ns[storage] * self.hardware.h2d_bytes_per_s < choices.movable[storage].nbytes * 10**9

    def _worth(self, storage: int) -> bool:
        """Whether a code takes less time than to fetch what it saves."""
        choices = self.choices
        return choices.code_ns[storage] * self.hardware.h2d_bytes_per_s < choices.saving[storage] * 10**9

    def starts(self, seeds: Sequence[Seed], budget: int, count: int, work: int) -> list[Found]:
        """The fastest ways to run the seeds that fit, as the allocator's model has it, so many of them.

        What the allocator takes beside what is requested differs from seed to seed. The fastest that was not tried is
        tried first; where it does not fit, it comes back for a lower target, at which it takes longer. After `work`
        one that fits is enough, found by bisection.
        """
        limit = self.work + work
        step = budget >> (6 if len(self.trace.ops) < LONG else 4)
        queue = [(*seed.found.rank, number, seed.found) for number, seed in enumerate(seeds)]
        heapify(queue)
        fitting: list[Found] = []
        while queue and len(fitting) < count and self.work < limit:
            *_, number, found = heappop(queue)
            if self.fits(found, budget):
                for part in (2, 4):
                    between = self.fill(found.choice, seeds[number].shares, found.target_bytes + step // part)
                    if between.rank < found.rank and self.fits(between, budget):
                        found = between
                        break
                fitting.append(found)
                continue
            lower = self.fill(found.choice, seeds[number].shares, found.target_bytes - step)
            if found.requested_bytes <= found.target_bytes:  # it may need less yet
                heappush(queue, (*lower.rank, number, lower))
        while queue and not fitting:
            *_, number, found = heappop(queue)
            fitting = [low for low in [self._lowered(found, seeds[number].shares, budget)] if low is not None]
        return fitting

    def _lowered(self, found: Found, shares: dict[int, float], budget: int) -> Found | None:
        """The same for the largest target, of those tried, at which it fits."""
        low, high, best = budget * 10 // 16, found.target_bytes, None
        for _ in range(_REFITS):
            target = (low + high) // 2
            tried = self.fill(found.choice, shares, target)
            missed = tried.requested_bytes > target
            if not missed and self.fits(tried, budget):
                low, best = target, tried
            else:
                low, high = (target, high) if missed else (low, target)
        return best

    def least(self) -> list[Found]:
        """Ways to run with the least memory, the least first: all that can goes at once, and comes back on demand."""
        choices = self.choices
        total = sum(item.nbytes for item in choices.movable.values())
        cheap = frozenset(s for s in choices.chains if self._cheap(s))
        wanted = []
        again = frozenset(block.call for block in repeated(self.trace) if block.call in choices.blocks)
        levels = [frozenset(level) for level in choices.levels()[-2:]]
        for chosen in dict.fromkeys([frozenset[int](), again, *levels, *self._finer(again)]):
            if choices.base(chosen) is None:
                continue
            caps = _RUNS if not chosen else _RUNS[1:2]
            runs = [(dropped, cap) for dropped in (frozenset(choices.chains), choices.light) for cap in caps]
            for coded in (frozenset[int](), frozenset(choices.codes)):
                wanted.append(Choice(chosen, coded))
                for dropped, cap in [*runs, (cheap, 5)]:
                    wanted.append(Choice(chosen, coded, self.cut(dropped, total >> cap, chosen)))
        found = []
        for choice in dict.fromkeys(settled for one in wanted if (settled := choices.settled(one)) is not None):
            away = list(choices.made(choice).parcels)
            found.append(self.judge(choice, away, 0, 0, prefetch=False))
            # as little is requested with prefetches where there is room, and the allocator may make more of that
            found.append(self.judge(choice, away, found[-1].requested_bytes, 0))
        return sorted(found, key=lambda one: (one.requested_bytes, one.time_ns))

    def tight(self, budget: int, room: int) -> Iterator[Found]:
        """Ways to run in little more than the least memory that fit, as the allocator's model has it.

        How much the allocator takes beside what is requested jumps with each change of the order: where nothing else
        was found, one of many targets may do.
        """
        wanted = list(dict.fromkeys(found.choice for found in self.least()))[:_TIGHT]
        for part in range(32, 14, -1):
            for choice in wanted:
                found = self.fill(choice, {}, room * part // 32)
                if found.requested_bytes <= room and self.fits(found, budget):
                    yield found

    def _finer(self, chosen: frozenset[int]) -> Iterator[frozenset[int]]:
        """The same blocks but that in which memory is highest, of which the blocks inside run again one by one."""
        choices = self.choices
        for _ in range(_FINER):
            choice = choices.settled(Choice(chosen))
            if choice is None:
                return
            step = choices.made(choice).step
            found = self.judge(choice, list(choices.made(choice).parcels), 0, 0, prefetch=False)
            live = requested(step.trace, found.schedule.moves)
            top = max(range(len(step.trace.ops)), key=lambda i: live[i])
            block = next((c for c in choices.inside(step.trace.ops[top].module) if c in chosen), None)
            parts = choices.parts(block) if block is not None else ()
            if not parts:
                return
            chosen = chosen - {block} | frozenset(parts)
            yield chosen

    def cut(self, wanted: Collection[int], cap: int, chosen: frozenset[int] = frozenset()) -> frozenset[int]:
        """What is computed again, without those at which a run of it would grow beyond the cap in bytes.

        A run is made at once when backward asks for its end, and lives until each of its parts was used.
        """
        base = self.choices.base(chosen)
        assert base is not None
        lengths: dict[int, int] = {}
        storages = self.trace.storages
        for s in sorted((s for s in wanted if s in base.chains), key=lambda s: storages[s].alloc):
            before = lengths.get(self.trace.saved[base.chains[s].source].storage, 0)
            if not before or before + storages[s].nbytes <= cap:
                lengths[s] = before + storages[s].nbytes
        return frozenset(lengths)

    def fill(self, choice: Choice, shares: dict[int, float], target: int) -> Found:
        """Offload what the program does, then what was saved first, as far as it takes."""
        parcels = self.choices.made(choice).parcels
        ordered = sorted(parcels, key=lambda s: (shares.get(s, 0.0) < 0.5, parcels[s].out))
        return self.fewest(choice, ordered, target, 1)
