"""A step in which codes stand for some feature maps between forward and backward, as a trace.

    encoded(trace, plan)     the step under the plan's `Encode` actions
    encode(trace, codes)     the step with these codes, by storage
    planned(trace, plan)     the step under all that a plan changes in it: also its `Recompute` actions

Where the first of a storage's saved tensors is packed, ops make the code; the storage itself goes when forward lets go
of it. Where backward first asks for one, ops make a storage of the same form from the code, which then goes. In the new
step the saved tensors are those of the code, under their old names: so a plan that offloads the code holds for it.

Ops and scratch are those of the engine (`vdnn.engine.encoded`), so requested bytes are exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vdnn.analysis.blocks import blocked
from vdnn.analysis.encodable import elements_of, refusals, windows
from vdnn.analysis.insertion import call_at, op_of, saved_at, stored_at
from vdnn.analysis.moments import Moment, Points
from vdnn.analysis.recomputing import recomputed
from vdnn.errors import PlanMismatchError
from vdnn.values.codes import ITEM_BYTES, Code, code_bytes, restored_bytes
from vdnn.values.plan import Encode, Plan
from vdnn.values.trace import Category, Kernel, Op, Phase, Storage, Trace

__all__ = ["code_ops", "encode", "encoded", "planned"]


def encoded(trace: Trace, plan: Plan | None) -> Trace:
    """The step under a plan's `Encode` actions; the trace itself if it has none.

    Raises:
        PlanMismatchError: the plan names what the trace does not have, or a code that is not enough for a reader.
    """
    entries = [e for e in plan.entries if isinstance(e.action, Encode)] if plan is not None else []
    if not entries:
        return trace
    points = Points(trace)
    tensors: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        tensors.setdefault(t.storage, []).append(i)
    codes: dict[int, Code] = {}
    for entry in entries:
        group = sorted(points.find(name) for name in entry.saved)
        storage = trace.saved[group[0]].storage
        assert isinstance(entry.action, Encode)
        why = ""
        if group != tensors[storage]:
            why = "its entry leaves out a tensor in its storage"
        elif storage in codes:
            why = "it shares its storage with another entry"
        if why:
            raise PlanMismatchError(
                f"{entry.saved[0]} of {trace.model} cannot be encoded as {entry.action.how!r}: {why}"
            )
        codes[storage] = entry.action.how
    return encode(trace, codes)


def encode(trace: Trace, codes: Mapping[int, Code], *, checked: bool = True) -> Trace:
    """The step in which these codes stand for these storages; their numbers begin behind the trace's own.

    A search that rewrites the same step a hundred times may do without `checked`.

    Raises:
        PlanMismatchError: a code that is not enough for a reader.
    """
    return _Rewriting(trace, codes, checked).write() if codes else trace


def code_ops(trace: Trace, codes: Mapping[int, Code]) -> tuple[Trace, dict[int, range]]:
    """The ops that make and read these codes, as the ops of a trace, and by storage which of them are its own."""
    rewriting = _Rewriting(trace, codes, checked=False)
    ops: list[Op] = []
    own = {}
    for storage in codes:
        before, first = len(rewriting.blocks), len(ops)
        rewriting.encode(storage)
        for block in rewriting.blocks[before:]:
            ops += block.ops
        own[storage] = range(first, len(ops))
    return replace(trace, ops=tuple(ops), storages=(*trace.storages, *rewriting.storages), saved=(), modules=()), own


def planned(trace: Trace, plan: Plan | None) -> Trace:
    """The step that runs under a plan, but for what is offloaded: `resolve` says what of it moves, and when.

    Raises:
        PlanMismatchError: as `blocked`, `recomputed` and `encoded`.
    """
    return encoded(recomputed(blocked(trace, plan), plan), plan)


@dataclass(slots=True)
class _Block:
    """Ops that are put in front of what follows a moment. `late`: after what is freed at its position."""

    moment: Moment
    late: bool
    ops: list[Op]


class _Rewriting:
    def __init__(self, trace: Trace, codes: Mapping[int, Code], checked: bool) -> None:
        self.trace = trace
        self.points = Points(trace)
        self.codes = codes
        self.checked = checked
        self.refused = refusals(trace, codes) if checked else {}
        self.tensors: dict[int, list[int]] = {}
        for i, t in enumerate(trace.saved):
            self.tensors.setdefault(t.storage, []).append(i)
        self.storages: list[Storage] = []  # new ones; positions are filled in at the end
        self.life: list[tuple[int, int, int, int]] = []  # of each: block and op it begins at, block and op it ends at
        self.blocks: list[_Block] = []
        self.code: dict[int, int] = {}  # storage → its code
        self.back: dict[int, int] = {}  # storage → what is made from the code

    # -- what is put in ----------------------------------------------------------------------------

    def write(self) -> Trace:
        for storage in self.codes:
            self.encode(storage)
        return self._finish()

    def encode(self, storage: int) -> None:
        trace, how = self.trace, self.codes[storage]
        group = self.tensors[storage]
        why = self.refused.get(storage)
        if why:
            raise PlanMismatchError(
                f"{self.points.names[group[0]]} of {trace.model} cannot be encoded as {how!r}: {why}"
            )
        asked = [(moment, i) for i in group if (moment := self.points.unpack(i)) is not None]
        first = self.points.pack(group[0])
        need = min(asked) if asked else None
        dtype = trace.saved[group[0]].dtype
        n = elements_of(trace, storage, dtype)
        # the result of the op before is packed inside that op's call, an op's input before the op
        late = not first[0] or storage not in trace.ops[first[0] - 1].writes
        made = _Maker(self, _Block(first, late, []), "forward", trace.saved[group[0]].module, dtype, n)
        again = None
        if need is not None:
            again = _Maker(self, _Block(need[0], True, []), "backward", trace.saved[need[1]].module, dtype, n)
        code = self.code[storage] = self._code(made, how, storage, n)
        if again is not None:
            self.back[storage] = self._decode(again, how, storage, code, n)
            again.ends(code)

    def _code(self, made: _Maker, how: Code, storage: int, n: int) -> int:
        stays, item = code_bytes(how, n), ITEM_BYTES[made.dtype]
        if how == "shape":
            code = made.storage(0, None, "activation")
        elif how.startswith("index"):
            at = made.op("vdnn.narrow", "copy", (storage,), (), item * n, stays)
            code = made.storage(stays, at, "activation")
        else:
            padded = 8 * stays
            mask = made.storage(padded, made.op("vdnn.compare", "elementwise", (storage,), (), item * n, n))
            made.op("vdnn.gather_bits", "elementwise", (mask,), (mask,), padded, padded)
            at = made.op("vdnn.shift_bits", "elementwise", (mask,), (), padded, stays)
            code = made.storage(stays, at, "activation")
            if how == "sign":
                made.op("vdnn.invert", "elementwise", (code,), (code,), stays, stays)
            made.ends(mask)
        return code

    def _decode(self, again: _Maker, how: Code, storage: int, code: int, n: int) -> int:
        item = ITEM_BYTES[again.dtype]
        full, stays = restored_bytes(how, n, item), code_bytes(how, n)
        if how == "shape":
            return again.storage(full, again.op("vdnn.empty", "view", (code,), (), 0, 0), "activation")
        if how.startswith("index"):
            pool = windows(self.trace, storage)
            assert pool is not None
            start = 8 * (pool[1] + 1)
            starts = again.storage(start, again.op("vdnn.window_starts", "elementwise", (), (), 0, start))
            made = again.storage(
                full, again.op("vdnn.widen", "elementwise", (code, starts), (), stays + start, full), "activation"
            )
            again.op("vdnn.wrap", "elementwise", (made,), (made,), full, full)
            again.op("vdnn.add_starts", "elementwise", (made, starts), (made,), full + start, full)
            again.ends(starts)
            return made
        steps = again.storage(8, again.op("vdnn.bit_numbers", "elementwise", (), (), 0, 8))
        powers = again.storage(8, again.op("vdnn.bit_values", "elementwise", (steps,), (), 8, 8))
        made = again.storage(
            full, again.op("vdnn.spread_bits", "elementwise", (code, powers), (), stays + 8, full), "activation"
        )
        if how == "bits":
            again.op("vdnn.to_bool", "elementwise", (made,), (made,), full, full)
        again.ends(steps, 2)
        again.ends(powers)
        return made

    # -- where everything else comes to lie --------------------------------------------------------

    def _finish(self) -> Trace:
        trace = self.trace
        order = sorted(range(len(self.blocks)), key=lambda b: self.blocks[b].moment)
        moments = [self.blocks[b].moment for b in order]
        at = [moment[0] for moment in moments]
        sums = [0]
        for b in order:
            sums.append(sums[-1] + len(self.blocks[b].ops))
        early = [0]  # ops in blocks that come before what is freed at their position
        for b in order:
            early.append(early[-1] + (0 if self.blocks[b].late else len(self.blocks[b].ops)))

        def index(op: int) -> int:
            """Where an op is now: behind everything put in front of it."""
            return op + sums[bisect_left(at, op + 1)]

        def freed(position: int) -> int:
            """Where something ends now that ended at a position."""
            begin, end = bisect_left(at, position), bisect_left(at, position + 1)
            return position + sums[begin] + early[end] - early[begin]

        def moved(moment: Moment, own: bool) -> int:
            """A moment's position now; `own` says that what is put in at it comes before it."""
            return moment[0] + sums[bisect_left(moments, (moment[0], moment[1] + own))]

        first = [0] * len(self.blocks)
        for place, b in enumerate(order):
            first[b] = at[place] + sums[place]
        points = self.points
        last_pack: dict[int, int] = {}
        saved = []
        for i, t in enumerate(trace.saved):
            packed = moved(points.pack(i), True)
            last_pack[t.storage] = max(last_pack.get(t.storage, 0), packed)
            asked = tuple(moved((p, 2 * len(trace.saved) + 2 + i), False) for p in t.unpacked_at)
            storage = self.code.get(t.storage, t.storage)
            saved.append(saved_at(t, storage, packed, asked))
        needs: dict[int, int] = {}
        for t in saved:
            for p in t.unpacked_at:
                needs[t.storage] = min(needs.get(t.storage, p), p)
        storages = []
        for number, s in enumerate(trace.storages):
            alloc = index(s.alloc) if s.alloc >= 0 else -1
            release, free, need = freed(s.release), freed(s.free), needs.get(number, -1)
            if number in self.code:
                release = free = max(release, last_pack[number], alloc + 1)
            storages.append(stored_at(s, alloc, release, need if s.need >= 0 else -1, free))
        n = len(trace.storages)
        source = {made: old for old, made in self.back.items()}
        codes = {code: old for old, code in self.code.items()}
        for number, (block, begin, last, end) in enumerate(self.life, n):
            alloc = first[block] + begin
            if number in source:
                free = freed(trace.storages[source[number]].free)
            elif last >= 0:
                free = first[last] + end
            else:
                free = freed(trace.storages[codes[number]].free)  # a code that nobody asks for
            release, need = free, -1
            if number in codes:
                release, need = first[block] + len(self.blocks[block].ops), needs.get(number, -1)
            storages.append(stored_at(self.storages[number - n], alloc, release, need, free))
        modules = []
        for c, call in enumerate(trace.modules):
            end = moved(points.end(c), True)
            backward = (call.backward_begin, call.backward_end)
            if call.backward_begin >= 0:
                backward = (index(call.backward_begin), index(call.backward_end - 1) + 1)
            begin = min(freed(call.forward_begin), end)
            modules.append(call_at(call, begin, end, *backward))
        ops: list[Op] = []
        place = 0
        back, forward_end = self.back, trace.forward_end
        for i, op in enumerate((*trace.ops, None)):
            while place < len(order) and at[place] == i:
                ops += self.blocks[order[place]].ops
                place += 1
            if op is None:
                break
            if i >= forward_end and not (back.keys().isdisjoint(op.reads) and back.keys().isdisjoint(op.writes)):
                reads, writes = (tuple(back.get(s, s) for s in touched) for touched in (op.reads, op.writes))
                op = op_of(op, op.phase, reads, writes)
            ops.append(op)
        step = replace(trace, ops=tuple(ops), storages=tuple(storages), saved=tuple(saved), modules=tuple(modules))
        if self.checked:
            step.check()
        return step


class _Maker:
    """Puts ops and storages into one block."""

    def __init__(self, owner: _Rewriting, block: _Block, phase: Phase, module: int, dtype: str, elements: int) -> None:
        self.owner = owner
        self.block = block
        self.number = len(owner.blocks)
        owner.blocks.append(block)
        self.phase = phase
        self.module = module
        self.dtype = dtype
        self.elements = elements

    def op(
        self, name: str, kernel: Kernel, reads: tuple[int, ...], writes: tuple[int, ...], read: int, written: int
    ) -> int:
        """An op; its place in the block."""
        elements = min(self.elements, max(read, written))
        self.block.ops.append(
            Op(
                name,
                self.phase,
                self.module,
                kernel,
                self.dtype,
                (elements, elements, 0),
                reads,
                writes,
                0,
                read,
                written,
                0,
            )
        )
        return len(self.block.ops) - 1

    def storage(self, nbytes: int, at: int | None, category: Category = "temporary") -> int:
        """A storage that the op at that place makes; one of no bytes needs none."""
        number = len(self.owner.trace.storages) + len(self.owner.storages)
        self.owner.storages.append(Storage(nbytes, category, "", 0, 0, -1, 0, ""))
        self.owner.life.append((self.number, at or 0, -1, -1))
        if at is not None:
            self.block.ops[at] = replace(self.block.ops[at], writes=(*self.block.ops[at].writes, number))
        return number

    def ends(self, storage: int, end: int = -1) -> None:
        """It ends with this block, or before the op at a place of it."""
        place = storage - len(self.owner.trace.storages)
        block, at, _, _ = self.owner.life[place]
        self.owner.life[place] = (block, at, self.number, len(self.block.ops) if end < 0 else end)
