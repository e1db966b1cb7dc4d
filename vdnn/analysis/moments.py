"""From a plan's points to moments of a trace: what moves when, in program order.

    points = Points(trace)            names of saved tensors and points ⇄ moments
    moves = resolve(plan, trace)      one Move a storage (or saved view) that goes out and comes back

A *moment* is (position, order): order tells apart the points of one position. Packs come in pack order; the
end of a module call comes after the last pack made in it; unpacks come last, in pack order. At one pack, the
tensor's own copy out is first, then the releases listed there in plan order. At one unpack, the storage's
own fetch (if nothing fetched it before) is first, then the prefetches listed there in plan order, then waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vdnn.analysis.tensorwise import trips
from vdnn.errors import PlanMismatchError
from vdnn.values.plan import OUTSIDE, Copy, Encode, Entry, Offload, Plan, Point, SavedName
from vdnn.values.trace import SavedTensor, Trace

__all__ = ["MOVABLE", "Moment", "Move", "Points", "extent", "released_at", "resolve"]

Moment = tuple[int, int]
# Parameters, buffers, gradients and optimizer states are not vdnn's to move.
MOVABLE = ("activation", "input")


@dataclass(frozen=True, slots=True)
class Move:
    """One storage, or the stretch of it that one saved view spans, that goes to the host and comes back.

    `saved` is the tensor it is named by, `entry` its place in the plan. `fetch` is None for what backward
    never asks for; `on_demand` says that the fetch happens at `need`. `wait` is a moment before `need` at
    which the compute stream already waits for the copy.

    The copy back's buffer goes at position `until`, the host's at `host_until`. `lane` says which streams copy: a
    "pair" of one each way, "compute" itself, or one "side" stream for both ways, where a copy back starts only when
    compute has come to position `behind` (-1: at once). `frees` is False where something else holds the storage.
    """

    storage: int
    saved: int
    nbytes: int
    entry: int
    out: Moment
    release: Moment
    fetch: Moment | None
    on_demand: bool
    wait: Moment | None
    need: Moment | None
    until: int
    host_until: int
    lane: Literal["pair", "compute", "side"] = "pair"
    behind: int = -1
    frees: bool = True


class Points:
    """The program points of a trace: names to moments, and saved tensors to names."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.names: list[SavedName] = []
        self._saved: dict[tuple[str, int, int], int] = {}
        self._calls = {(call.fqn, call.call): i for i, call in enumerate(trace.modules)}
        self._packs_at: dict[int, list[int]] = {}
        for i, t in enumerate(trace.saved):
            fqn, call = (trace.modules[t.module].fqn, trace.modules[t.module].call) if t.module >= 0 else (OUTSIDE, 0)
            self.names.append(SavedName(fqn, call, t.index, t.dtype, len(t.shape), t.nbytes))
            self._saved[fqn, call, t.index] = i
            self._packs_at.setdefault(t.packed_at, []).append(i)
        self._last_inside = list(range(len(trace.modules)))
        for i in range(len(trace.modules) - 1, -1, -1):
            parent = trace.modules[i].parent
            if parent >= 0:
                self._last_inside[parent] = max(self._last_inside[parent], self._last_inside[i])

    def find(self, name: SavedName) -> int:
        """Index of the saved tensor of that name.

        Raises:
            PlanMismatchError: the trace packs no such tensor, or one of another dtype, rank or size.
        """
        found = self._saved.get((name.module, name.call, name.index))
        if found is None:
            raise PlanMismatchError(
                f"the plan names the saved tensor {name}, which {self._model()} does not pack: {self._way_out(name)}"
            )
        here = self.names[found]
        if here != name:
            raise PlanMismatchError(
                f"the plan's saved tensor {name} is {name.dtype} of rank {name.rank} with {name.nbytes} bytes, in "
                f"{self._model()} it is {here.dtype} of rank {here.rank} with {here.nbytes} bytes: "
                "make the plan from this trace"
            )
        return found

    def moment(self, text: str) -> Moment:
        """The moment of a point.

        Raises:
            FormatError: not a point.
            PlanMismatchError: the trace has no such point.
        """
        point = Point.parse(text)
        if point.kind == "end":
            return self.end(self.call(text))
        found = self._saved.get((point.module, point.call, point.index))
        if found is None:
            raise PlanMismatchError(f"the plan's point {text!r} is a saved tensor that {self._model()} does not pack")
        moment = self.pack(found) if point.kind == "pack" else self.unpack(found)
        if moment is None:
            raise PlanMismatchError(f"the plan's point {text!r} never comes: no backward of {self._model()} unpacks it")
        return moment

    def call(self, text: str) -> int:
        """Index of the module call at whose end a point is.

        Raises:
            FormatError: not a point.
            PlanMismatchError: the trace has no such call.
        """
        point = Point.parse(text)
        call = self._calls.get((point.module, point.call))
        if call is None:
            raise PlanMismatchError(f"the plan's point {text!r} is a module call that {self._model()} does not make")
        return call

    def saved_at(self, module: str, call: int, index: int) -> int | None:
        """Index of the saved tensor of that place, if the trace packs one there."""
        return self._saved.get((module, call, index))

    def pack(self, saved: int) -> Moment:
        """When that saved tensor is packed."""
        return self.trace.saved[saved].packed_at, 2 * saved + 1

    def end(self, call: int) -> Moment:
        """When that module call returns: after the packs made in it, before those of what follows."""
        modules = self.trace.modules
        outer = set()
        parent = modules[call].parent
        while parent >= 0:
            outer.add(parent)
            parent = modules[parent].parent
        position = modules[call].forward_end
        last = -1
        for i in self._packs_at.get(position, ()):
            if 0 <= self.trace.saved[i].module <= self._last_inside[call] and self.trace.saved[i].module not in outer:
                last = i
        return position, 2 * last + 2

    def unpack(self, saved: int) -> Moment | None:
        """When backward first asks for that saved tensor; None if it never does."""
        asked = self.trace.saved[saved].unpacked_at
        return (min(asked), 2 * len(self.trace.saved) + 2 + saved) if asked else None

    def _model(self) -> str:
        return f"the trace of {self.trace.model} (batch {self.trace.batch})"

    def _way_out(self, name: SavedName) -> str:
        if (name.module, name.call) in self._calls:
            return f"that call of {name.module or 'the model'} packs fewer; make the plan from this trace"
        return f"it makes no call {name.module}#{name.call}; make the plan from this trace"


def extent(saved: SavedTensor) -> tuple[int, int]:
    """First byte and number of bytes that a saved tensor spans in its storage."""
    elements = math.prod(saved.shape)
    if not elements:
        return 0, 0
    item = saved.nbytes // elements
    span = 1 + sum((size - 1) * stride for size, stride in zip(saved.shape, saved.stride, strict=True))
    return saved.offset * item, span * item


def resolve(plan: Plan | None, trace: Trace, points: Points | None = None) -> tuple[Move, ...]:
    """The moves of a plan on a trace, in plan order; none without a plan.

    A plan that encodes moves the codes, which only its own step has (`vdnn.analysis.encoding.encoded`).

    Raises:
        PlanMismatchError: names the first point or saved tensor of the plan that the trace does not have.
    """
    if plan is None:
        return ()
    points = points or Points(trace)
    if plan.device != trace.device:
        raise PlanMismatchError(
            f"the plan is for the step of a {plan.device} device, the trace is of {trace.device}: "
            "their saved tensors differ, make the plan from this trace"
        )
    by_storage: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        by_storage.setdefault(t.storage, []).append(i)
    taken: dict[int, int] = {}
    moves: list[Move] = []
    for number, entry in enumerate(plan.entries):
        tensors = [points.find(name) for name in entry.saved]
        storage = trace.saved[tensors[0]].storage
        for i in tensors:
            if trace.saved[i].storage != storage:
                raise PlanMismatchError(
                    f"the plan's entry of {entry.saved[0]} holds {points.names[i]}, which is in another storage here"
                )
        if storage in taken and plan.copies is None:
            raise PlanMismatchError(
                f"{entry.saved[0]} shares its storage with {plan.entries[taken[storage]].saved[0]}, another entry"
            )
        taken[storage] = number
        nbytes = entry.storage_bytes if entry.code_bytes is None else entry.code_bytes
        if trace.storages[storage].nbytes != nbytes:
            raise PlanMismatchError(
                f"the plan's storage of {entry.saved[0]} has {nbytes} bytes, here it has "
                f"{trace.storages[storage].nbytes}: make the plan from this trace"
            )
        if isinstance(entry.action, Offload) or (isinstance(entry.action, Encode) and entry.action.release_at):
            left_out = sorted(set(by_storage[storage]) - set(tensors))
            if left_out:
                raise PlanMismatchError(
                    f"the plan's entry of {entry.saved[0]} leaves out {points.names[left_out[0]]}, "
                    "which shares its storage"
                )
            moves += _moves(points, number, entry, entry.action, storage, sorted(tensors), nbytes)
    if plan.copies is not None:
        moves += _copies(plan, plan.copies, points, by_storage)
    if plan.default == "offload":
        for storage, tensors in by_storage.items():
            s = trace.storages[storage]
            if storage not in taken and s.category in MOVABLE and s.nbytes >= plan.min_bytes:
                raise PlanMismatchError(
                    f"the plan has no entry for {points.names[tensors[0]]} and offloads it by rule, which only a run "
                    "can do: name every saved tensor, or set the default to keep"
                )
    return tuple(moves)


def _moves(
    points: Points,
    number: int,
    entry: Entry,
    action: Offload | Encode,
    storage: int,
    tensors: Sequence[int],
    storage_bytes: int,
) -> list[Move]:
    release = points.moment(action.release_at)
    if release < max(points.pack(i) for i in tensors):
        raise PlanMismatchError(
            f"the plan releases {entry.saved[0]} at {action.release_at!r}, before the last of its tensors is packed"
        )
    prefetch = points.moment(action.prefetch_at) if action.prefetch_at else None
    wait = points.moment(action.wait_at) if action.wait_at else None
    moves = []
    groups = {(0, storage_bytes): list(tensors)}
    if isinstance(action, Offload) and not action.whole:
        groups = {}
        for i in tensors:
            groups.setdefault(extent(points.trace.saved[i]), []).append(i)
    for (_, nbytes), group in groups.items():
        asked = [moment for moment in map(points.unpack, group) if moment is not None]
        need = min(asked) if asked else None
        on_demand = need is not None and (prefetch is None or prefetch >= need)
        fetch = need if on_demand else prefetch
        early = wait is not None and fetch is not None and fetch < wait and (need is None or wait < need)
        out = min(points.pack(i) for i in group)
        early_wait = wait if early else None
        s = points.trace.storages[storage]
        lives = (s.free, max(s.free, out[0] + 1))
        moves.append(Move(storage, group[0], nbytes, number, out, release, fetch, on_demand, early_wait, need, *lives))
    return moves


def _copies(plan: Plan, how: Copy, points: Points, by_storage: dict[int, list[int]]) -> list[Move]:
    """Moves of a plan that copies saved tensor by saved tensor; a storage goes if all that is saved of it is copied."""
    entry_of = {points.find(e.saved[0]): n for n, e in enumerate(plan.entries) if isinstance(e.action, Copy)}
    moves = []
    for trip in trips(points, entry_of, how):
        t = points.trace.saved[trip.saved]
        moves.append(
            Move(
                t.storage,
                trip.saved,
                t.nbytes,
                entry_of[trip.saved],
                trip.out,
                trip.release,
                trip.fetch,
                on_demand=trip.fetch is not None,
                wait=None,
                need=trip.fetch,
                until=trip.until,
                host_until=trip.host_until,
                lane=how.stream,
                behind=trip.behind,
                frees=entry_of.keys() >= set(by_storage[t.storage]),
            )
        )
    return moves


def released_at(moves: Sequence[Move]) -> dict[int, int]:
    """Storages that the moves let go of, and at which position the last of them does."""
    found: dict[int, int] = {}
    for move in moves:
        if move.frees:
            found[move.storage] = max(found.get(move.storage, 0), move.release[0])
    return found
