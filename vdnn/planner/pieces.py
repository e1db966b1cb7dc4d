"""What may be away between forward and backward, and what it takes to have it again.

pieces(trace)          one a storage: when it may be away, what a copy of it carries, and the ops that make it again
codes(trace, …)        codes that may stand for some of them, with their time
least_memory(trace)    requested bytes that no plan goes below
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vdnn.analysis.chains import makers
from vdnn.analysis.encodable import encodable
from vdnn.analysis.encoding import code_ops
from vdnn.analysis.liveness import requested
from vdnn.analysis.moments import MOVABLE, extent
from vdnn.costs import times_with
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Trace

__all__ = ["Group", "Piece", "codes", "least_memory", "pieces"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One storage that may be away, in [gone, need): the least that a copy carries, and the ops that make it again.

    `free` is where autograd lets go of it; `again` is None if nothing makes it again, and empty where its form is all
    that is asked for. A search adds what it takes besides, `again_ns`.
    """

    storage: int
    nbytes: int
    moved: int
    pack: int
    gone: int
    need: int
    free: int
    again: tuple[int, ...] | None
    again_ns: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Storages that come again together: they go at `gone` or later, and are all back at `need`, which takes `ns`.

    A code is made at position `at` of forward, which takes `made_ns`.
    """

    number: int
    storages: frozenset[int]
    gone: int
    need: int
    ns: int
    at: int = 0
    made_ns: int = 0


def pieces(trace: Trace) -> list[Piece]:
    """Everything that any plan could take away between forward and backward, however small."""
    tensors: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        tensors.setdefault(t.storage, []).append(i)
    made = makers(trace)
    coded = encodable(trace)
    found = []
    for storage, group in tensors.items():
        s = trace.storages[storage]
        if s.category not in MOVABLE or s.held or not s.nbytes:
            continue
        packed = [trace.saved[i].packed_at for i in group]
        gone, need = max(s.release, max(packed)), s.need if s.need >= 0 else s.free
        if gone < need:
            again = () if coded.get(storage) == "shape" else _closure(trace, storage, need, made)
            covered = min(s.nbytes, _covered(trace, group)) if s.need >= 0 else 0
            found.append(Piece(storage, s.nbytes, covered, min(packed), gone, need, s.free, again))
    return found


def _covered(trace: Trace, group: Sequence[int]) -> int:
    covered = end = 0
    for first, nbytes in sorted(extent(trace.saved[i]) for i in group):
        covered += max(0, first + nbytes - max(first, end))
        end = max(end, first + nbytes)
    return covered


def _closure(trace: Trace, storage: int, position: int, made: dict[int, list[int]]) -> tuple[int, ...] | None:
    """The ops that must run again to have a storage at a position, if all that may be there is there."""
    ops: set[int] = set()
    wanted, seen = [storage], {storage}
    while wanted:
        makes = made.get(wanted.pop())
        if not makes:
            return None
        ops.update(makes)
        for op in makes:
            for r in trace.ops[op].reads:
                s = trace.storages[r]
                if r not in seen and not s.alloc <= position < s.free:
                    seen.add(r)
                    wanted.append(r)
    return tuple(sorted(ops))


def codes(trace: Trace, hardware: Hardware, items: Sequence[Piece]) -> list[Group]:
    """What it takes that codes stand for storages; that codes are somewhere is left out."""
    which = {storage: how for storage, how in encodable(trace).items() if how != "shape"}
    found = [piece for piece in items if piece.storage in which]
    step, own = code_ops(trace, {piece.storage: which[piece.storage] for piece in found})
    times = times_with(step, hardware, {}, "")
    made_of = []
    for piece in found:
        phases = {"forward": 0, "backward": 0}
        for op in own[piece.storage]:
            phases[step.ops[op].phase] += times[op]
        made, read = phases["forward"], phases["backward"]
        storage = piece.storage
        made_of.append(Group(storage, frozenset({storage}), piece.gone, piece.need, read, piece.pack, made))
    return made_of


def least_memory(trace: Trace) -> int:
    """Requested bytes that no plan goes below: whatever may be away is away, in no time."""
    change = [0] * (len(trace.ops) + 2)
    for piece in pieces(trace):
        change[piece.gone] += piece.nbytes
        change[piece.need] -= piece.nbytes
    away = accumulate(change)
    return max((live - gone for live, gone in zip(requested(trace), away, strict=False)), default=0)
