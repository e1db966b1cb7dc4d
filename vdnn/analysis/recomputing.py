"""A step in which some feature maps are dropped in forward and computed again in backward, as a trace.

    again = recomputed(trace, plan)          the step under the plan's `Recompute` actions
    regenerators(trace, storage)             the forward ops that make a storage, or None if they may not run twice

A dropped storage goes when forward lets go of it. Where backward asks for it, the ops that made it run once more,
and before them those that made what they read, as far back as something is there: a parameter, an input, a storage
that stays, or one that was computed again already. What was made on the way stays until its own use if it was
dropped too, and else goes at once. Names of saved tensors stay as they were, so plans hold for both steps.

What draws random numbers is never run twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from vdnn.analysis.chains import RANDOM, Chain, makers, planned_chains
from vdnn.analysis.insertion import call_at, op_of, saved_at, shifted, stored_at
from vdnn.analysis.moments import Points
from vdnn.errors import PlanMismatchError
from vdnn.values.plan import Offload, Plan, Recompute
from vdnn.values.trace import Op, Storage, Trace

__all__ = ["makeable", "recompute", "recomputed", "regenerators"]


def regenerators(trace: Trace, storage: int, made: dict[int, list[int]] | None = None) -> list[int] | None:
    """The forward ops that make a storage; None if there are none, or one draws random numbers."""
    ops = (makers(trace) if made is None else made).get(storage)
    if not ops or any(word in trace.ops[i].name for i in ops for word in RANDOM):
        return None
    return ops


def makeable(trace: Trace, wanted: Collection[int], away: Collection[int] = ()) -> set[int]:
    """Those of the storages that can all be dropped together; `away` are offloaded.

    The others depend on something that is gone by then and may not be made twice, so they must stay.
    """
    made = makers(trace)
    dropped = set(wanted)
    for storage in sorted(dropped, key=lambda s: trace.storages[s].alloc):
        if not _obtainable(trace, storage, trace.storages[storage].need, dropped, set(away), made, {}):
            dropped.discard(storage)
    return dropped


def _obtainable(
    trace: Trace,
    storage: int,
    position: int,
    dropped: set[int],
    away: set[int],
    made: dict[int, list[int]],
    known: dict[int, bool],
) -> bool:
    """Whether the bytes of a storage are there at a position, or can be made there."""
    if storage not in known:
        s = trace.storages[storage]
        there = s.alloc <= position < s.free and not (storage in away and position < s.need)
        if there and storage not in dropped:
            known[storage] = True
        else:
            ops = regenerators(trace, storage, made)
            sources = {r for i in ops or () for r in trace.ops[i].reads if r not in trace.ops[i].writes}
            known[storage] = ops is not None and all(
                _obtainable(trace, r, position, dropped, away, made, known) for r in sources - {storage}
            )
    return known[storage]


def recomputed(trace: Trace, plan: Plan | None) -> Trace:
    """The step under a plan's `Recompute` actions; the trace itself if it has none.

    Raises:
        PlanMismatchError: the plan names what the trace does not have, or what cannot be computed again.
    """
    entries = (
        [e for e in plan.entries if isinstance(e.action, Recompute) and not e.action.block] if plan is not None else []
    )
    if plan is None or not entries:
        return trace
    points = Points(trace)
    dropped = {trace.saved[points.find(e.saved[0])].storage for e in entries}
    ways = planned_chains(plan, points)
    away = {trace.saved[points.find(e.saved[0])].storage for e in plan.entries if isinstance(e.action, Offload)}
    return recompute(trace, dropped, away, ways)


def recompute(
    trace: Trace,
    dropped: Collection[int],
    away: Collection[int] = (),
    ways: Mapping[int, Chain] | None = None,
    *,
    checked: bool = True,
) -> Trace:
    """The step without these storages between forward and backward; `away` are those that are offloaded.

    `ways` says by which ops a storage is made; without it by those that made it, as far back as it takes. A search
    that rewrites the same step a hundred times may do without `checked`.

    Raises:
        PlanMismatchError: a storage cannot be computed again.
    """
    return _Rewriting(trace, dropped, away, ways or {}, checked).write()


class _Rewriting:
    def __init__(
        self,
        trace: Trace,
        dropped: Collection[int],
        away: Collection[int],
        ways: Mapping[int, Chain],
        checked: bool,
    ) -> None:
        self.trace = trace
        self.checked = checked
        self.dropped = set(dropped)
        self.away = set(away)
        self.ways = ways
        self.asked: dict[int, list[int]] = {}  # saved tensor → where it is asked for to make another
        self.made = makers(trace)
        self.last_pack: dict[int, int] = {}
        for t in trace.saved:
            self.last_pack[t.storage] = max(self.last_pack.get(t.storage, 0), t.packed_at)
        self.inserted: list[tuple[int, list[Op]]] = []  # position there, ops with storages of the new step
        self.now: dict[int, int] = {}  # dropped storage → the one that was computed again
        self.storages: list[Storage] = list(trace.storages)
        self.born: dict[int, tuple[int, int]] = {}  # new storage → position there and place among the ops inserted
        self.dies: dict[int, tuple[int, int]] = {}  # the same for those that go at once

    def write(self) -> Trace:
        needs = sorted((self.trace.storages[s].need, s) for s in self.dropped)
        for position, storage in needs:
            if storage not in self.now:
                self._insert(position, storage)
        return self._finish()

    def _insert(self, position: int, storage: int) -> None:
        ops: list[Op] = []
        if self.inserted and self.inserted[-1][0] == position:
            ops = self.inserted.pop()[1]  # more of them at one position
        temporary: dict[int, int] = {}
        started: set[int] = set()  # what is fetched to start from
        making: set[int] = set()
        last_use: dict[int, int] = {}

        def again(s: int) -> int:
            """The storage that was made for this one, unless it is gone since; itself where there is none."""
            if s in self.now and position < self.trace.storages[s].free:
                return self.now[s]
            return temporary.get(s, s)

        def place(s: int) -> int:
            """Where the bytes of a storage are now; makes them again if they are nowhere."""
            if (known := again(s)) != s:
                return known
            old = self.trace.storages[s]
            there = old.alloc <= position < old.free and not (s in self.away and position < old.need)
            if (there or s in started) and s not in self.dropped:
                return s
            way = self.ways.get(s)
            if way is not None:
                self.asked.setdefault(way.source, []).append(position)
                started.add(self.trace.saved[way.source].storage)
            found = way.ops if way is not None else regenerators(self.trace, s, self.made)
            if found is None:
                raise PlanMismatchError(
                    f"storage {s} of {self.trace.model} cannot be computed again: nothing makes it in forward, or "
                    "what makes it draws random numbers"
                )
            if s in making:
                raise PlanMismatchError(
                    f"storage {s} of {self.trace.model} cannot be computed again: that takes the storage itself"
                )
            making.add(s)
            for number in found:
                op = self.trace.ops[number]
                reads = {r: place(r) for r in op.reads if r != s and r not in op.writes}
                for w in op.writes:
                    if again(w) == w:
                        kept = w in self.dropped and position < self.trace.storages[w].free
                        self._new(w, kept, temporary, position, len(ops))
                table = {**reads, **{w: again(w) for w in op.writes}}
                if s in op.reads and s not in table:  # a view of what was made just now
                    table[s] = again(s)
                new_reads = tuple(table.get(r, r) for r in op.reads)
                new_writes = tuple(table[w] for w in op.writes)
                for used in (*new_reads, *new_writes):
                    last_use[used] = len(ops)
                ops.append(op_of(op, "backward", new_reads, new_writes))
            return again(s)

        place(storage)
        for new in temporary.values():
            self.dies[new] = (position, last_use[new] + 1)
        self.inserted.append((position, ops))

    def _new(self, old: int, keep: bool, temporary: dict[int, int], position: int, place: int) -> None:
        s = self.trace.storages[old]
        category = s.category if keep else "temporary"
        self.storages.append(Storage(s.nbytes, category, s.name, s.alloc, s.free, -1, s.free, s.held))
        number = len(self.storages) - 1
        self.born[number] = (position, place)
        (self.now if keep else temporary)[old] = number

    def _finish(self) -> Trace:
        trace = self.trace
        at = [position for position, _ in self.inserted]
        before = [0]
        for _, again in self.inserted:
            before.append(before[-1] + len(again))

        moments = shifted(len(trace.ops), at, before)
        moment = moments.__getitem__

        def index(op: int) -> int:
            return moments[op + 1] - 1

        own = list(trace.ops)
        now = self.now
        for i in range(trace.forward_end, len(own)):
            op = own[i]
            if not (now.keys().isdisjoint(op.reads) and now.keys().isdisjoint(op.writes)):
                reads = tuple(now.get(r, r) for r in op.reads)
                own[i] = op_of(op, op.phase, reads, tuple(now.get(w, w) for w in op.writes))
        ops: list[Op] = []
        end = 0
        for position, again in self.inserted:
            ops += own[end:position]
            ops += again
            end = position
        ops += own[end:]
        first: dict[int, list[int]] = {}
        for i, positions in self.asked.items():
            first.setdefault(trace.saved[i].storage, []).extend(positions)
        storages = []
        for number, s in enumerate(self.storages):
            if number in self.born:
                position, place = self.born[number]
                alloc = moment(position) + place
                dies = self.dies.get(number)
                free = moment(dies[0]) + dies[1] if dies else moment(s.free)
                storages.append(stored_at(s, alloc, free, s.need, free))
            elif number in self.dropped:
                gone = moment(max(s.release, self.last_pack.get(number, 0)))
                storages.append(stored_at(s, index(s.alloc), gone, -1, gone))
            else:
                alloc = index(s.alloc) if s.alloc >= 0 else -1
                need = moment(min([s.need, *first.get(number, ())])) if s.need >= 0 else -1
                storages.append(stored_at(s, alloc, moment(s.release), need, moment(s.free)))
        saved = []
        for i, t in enumerate(trace.saved):
            asked = sorted({*self.asked.get(i, ()), *t.unpacked_at})
            saved.append(saved_at(t, t.storage, moment(t.packed_at), tuple(map(moment, asked))))
        modules = tuple(
            call_at(call, call.forward_begin, call.forward_end, moment(call.backward_begin), moment(call.backward_end))
            if call.backward_begin >= 0
            else call
            for call in trace.modules
        )
        made = replace(trace, ops=tuple(ops), storages=tuple(storages), saved=tuple(saved), modules=modules)
        if self.checked:
            made.check()
        return made
