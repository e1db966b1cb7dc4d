"""A step in which blocks of modules run a second time in backward, from their inputs, as a trace.

    blocks(trace)            module calls that can be computed again as a whole, and what that lets go of
    repeated(trace)          those of them that are a model's repeated blocks, the outermost first
    blocked(trace, plan)     the step under the plan's `Recompute(block=…)` actions
    run_again(trace, found)  the step in which these blocks run again

What a block saves stays until the block returns, and goes. Where backward first asks for something of it, the block
runs again up to the last pack that the plan needs, on copies of its buffers; what it makes on the way and nobody saves
goes as it did in forward. Names of saved tensors stay as they were, so plans hold for both steps.

A block starts from a saved tensor, which may be offloaded until then; or, where forward lets go of its input (a layer
under autocast saves a low-precision copy of it instead), the input stays on the device until the block has run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vdnn.analysis.chains import writes_others_buffers
from vdnn.analysis.insertion import call_at, op_of, saved_at, shifted, stored_at
from vdnn.analysis.moments import Points
from vdnn.errors import PlanMismatchError
from vdnn.values.plan import Plan, Point, Recompute
from vdnn.values.trace import Op, Storage, Trace

__all__ = ["Block", "block_actions", "blocked", "blocks", "repeated", "run_again"]


@dataclass(frozen=True, slots=True)
class Block:
    """A module call, the saved tensor that is its input, and the storages that go; all as indexes in the trace.

    `source` is -1 where no saved tensor is its input; `held` are the storages that it takes and that stay for it.
    """

    call: int
    source: int
    dropped: tuple[int, ...]
    held: tuple[int, ...] = ()


def blocks(trace: Trace) -> dict[int, Block]:
    """The calls of modules with modules inside that can run again from one saved tensor, by call."""
    inside = _inside(trace)
    parents = {call.parent for call in trace.modules}
    saved: dict[int, list[int]] = {}
    for i, t in enumerate(trace.saved):
        saved.setdefault(t.storage, []).append(i)
    forward_end = trace.forward_end
    able = {}  # saved storages that a block could let go of
    for i, tensors in saved.items():
        s = trace.storages[i]
        if s.category == "activation" and s.nbytes and not s.held and s.release < s.need and s.need >= forward_end:
            able[i] = tensors
    found = {}
    for c, call in enumerate(trace.modules):
        if c in parents and call.parent >= 0 and call.forward_end <= forward_end:
            block = _block(trace, c, inside[c], saved, able)
            if block is not None:
                found[c] = block
    return found


def repeated(trace: Trace) -> list[Block]:
    """The blocks with a sibling of their type, the outermost first: those that checkpointing is used for."""
    found: list[Block] = []
    taken: set[int] = set()
    kinds: dict[tuple[int, str], int] = {}
    for call in trace.modules:
        kinds[call.parent, call.type] = kinds.get((call.parent, call.type), 0) + 1
    for c, block in blocks(trace).items():
        call = trace.modules[c]
        alone = kinds[call.parent, call.type] < 2 or call.type in ("Sequential", "ModuleList", "ModuleDict")
        outer = call.parent
        while outer >= 0 and outer not in taken:
            outer = trace.modules[outer].parent
        if not alone and outer < 0 and block.dropped:
            taken.add(c)
            found.append(block)
    return found


def block_actions(points: Points, block: Block, why: str = "") -> dict[int, Recompute]:
    """The plan's actions for what this block lets go of, by storage."""
    call = points.trace.modules[block.call]
    source = str(points.names[block.source]) if block.source >= 0 else ""
    action = Recompute(why, (), source, f"{call.fqn}#{call.call}")
    return dict.fromkeys(block.dropped, action)


def _inside(trace: Trace) -> list[set[int]]:
    """For each module call itself and the calls inside it."""
    found: list[set[int]] = [{c} for c in range(len(trace.modules))]
    for c in range(len(trace.modules) - 1, -1, -1):
        parent = trace.modules[c].parent
        if parent >= 0:
            found[parent] |= found[c]
    return found


def _block(
    trace: Trace, c: int, inside: set[int], saved: dict[int, list[int]], able: dict[int, list[int]]
) -> Block | None:
    call = trace.modules[c]
    begin, end = call.forward_begin, call.forward_end
    ops = trace.ops[begin:end]
    if not ops or any(op.module not in inside for op in ops):
        return None
    if any(not (trace.modules[i].fqn + ".").startswith(call.fqn + ".") for i in inside):
        return None  # it calls a module that is not its own, whose buffers are not the block's to put back
    if writes_others_buffers(trace, ops, call.fqn):
        return None
    outer: set[int] = set()
    for op in ops:
        for s in op.reads:
            if trace.storages[s].alloc < begin and trace.storages[s].category not in ("parameter", "buffer"):
                outer.add(s)
        if any(trace.storages[w].alloc < begin and trace.storages[w].category != "buffer" for w in op.writes):
            return None  # it changes its input
    dropped = tuple(
        s
        for s, tensors in able.items()
        if begin <= trace.storages[s].alloc < end and all(trace.saved[i].module in inside for i in tensors)
    )
    if not dropped:
        return None
    need = min(trace.storages[s].need for s in dropped)
    last_write: dict[int, int] = {}
    for i, op in enumerate(trace.ops[end:need], end):
        for s in op.writes:
            last_write[s] = i
    if not outer or any(s in last_write for s in outer):
        return None
    if all(trace.storages[s].free > need for s in outer):
        sources = [i for s in outer for i in saved.get(s, ()) if trace.saved[i].module in inside]
        if sources:
            start = trace.saved[min(sources)].storage
            return Block(c, min(sources), dropped, tuple(sorted(outer - {start})))
    return Block(c, -1, dropped, tuple(sorted(outer)))


def blocked(trace: Trace, plan: Plan | None) -> Trace:
    """The step under a plan's `Recompute(block=…)` actions; the trace itself if it has none.

    Raises:
        PlanMismatchError: the plan names what the trace does not have, or a block that cannot run again.
    """
    chosen: dict[str, list[int]] = {}
    sources: dict[str, str] = {}
    if plan is not None and any(isinstance(e.action, Recompute) and e.action.block for e in plan.entries):
        points = Points(trace)
        for entry in plan.entries:
            action = entry.action
            if isinstance(action, Recompute) and action.block:
                storage = trace.saved[points.find(entry.saved[0])].storage
                chosen.setdefault(action.block, []).append(storage)
                sources[action.block] = action.source
    if not chosen:
        return trace
    possible = blocks(trace)
    found = []
    for text, dropped in chosen.items():
        block = possible.get(points.call(f"end {text}"))
        if block is None:
            raise PlanMismatchError(f"{text} of {trace.model} cannot run again from one saved tensor")
        strange = sorted(set(dropped) - set(block.dropped))
        if strange:
            raise PlanMismatchError(f"storage {strange[0]} of {trace.model} is not made and saved in {text} alone")
        source = _named(points, sources[text])
        if source != block.source and (
            source is None
            or min(source, block.source) < 0
            or trace.saved[source].storage != trace.saved[block.source].storage
        ):
            start = sources[text] or "its input alone"
            raise PlanMismatchError(f"{text} of {trace.model} does not start from {start}")
        found.append(replace(block, source=source, dropped=tuple(dropped)))
    return run_again(trace, found)


def _named(points: Points, text: str) -> int | None:
    """The saved tensor that a plan names as a source; -1 where it names none, None where there is none of the name."""
    if not text:
        return -1
    place = Point.parse(f"pack {text}")
    return points.saved_at(place.module, place.call, place.index)


def run_again(trace: Trace, found: Sequence[Block], *, checked: bool = True) -> Trace:
    """The step in which these blocks run again. A search that rewrites a step many times may do without `checked`.

    Raises:
        PlanMismatchError: two of them would run at one moment.
    """
    return _Rewriting(trace, Points(trace), found, checked).write() if found else trace


class _Rewriting:
    def __init__(self, trace: Trace, points: Points, found: Sequence[Block], checked: bool) -> None:
        self.trace = trace
        self.checked = checked
        self.points = points
        need = {block.call: min(trace.storages[s].need for s in block.dropped) for block in found}
        self.found = sorted(found, key=lambda block: need[block.call])
        self.at = [need[block.call] for block in self.found]
        self.packs: dict[int, int] = {}  # saved storage → where it is packed first
        for t in trace.saved:
            self.packs.setdefault(t.storage, t.packed_at)
        self.made_at: dict[int, list[int]] = {}  # op → the storages that it makes
        for i, s in enumerate(trace.storages):
            self.made_at.setdefault(s.alloc, []).append(i)
        self.buffers = [i for i, s in enumerate(trace.storages) if s.category == "buffer"]
        self.new: list[Storage] = []
        self.life: list[tuple[int, int, int]] = []  # of each: its block, and its first and last place among the ops
        self.stays: dict[int, int] = {}  # dropped storage → the one that is made again
        self.batches = [self._again(number, block) for number, block in enumerate(self.found)]

    def _storage(self, like: Storage, number: int, begin: int, end: int, kept: bool = False) -> int:
        """A storage in the place of another; `end` is -1 for one that backward gets."""
        category = like.category if kept else "temporary"
        self.new.append(Storage(like.nbytes, category, "", like.alloc, like.release, like.need, like.free, ""))
        self.life.append((number, begin, end))
        return len(self.trace.storages) + len(self.new) - 1

    def _again(self, number: int, block: Block) -> list[Op]:
        """The block's ops once more, up to the last pack that is needed."""
        trace, call = self.trace, self.trace.modules[block.call]
        begin, stop = call.forward_begin, max(self.packs[s] for s in block.dropped)
        prefix = f"{call.fqn}."
        buffers = [i for i in self.buffers if trace.storages[i].name.startswith(prefix)]
        length = len(buffers) + stop - begin
        ops: list[Op] = []
        now: dict[int, int] = {}
        for i in buffers:
            nbytes = trace.storages[i].nbytes
            now[i] = self._storage(trace.storages[i], number, len(ops), length)
            dims = (max(nbytes // 4, 1), max(nbytes // 4, 1), 0)
            ops.append(
                Op("aten.clone.default", "backward", block.call, "copy", "float32", dims, (i,), (now[i],), 0, nbytes,
                   nbytes, 0)
            )  # fmt: skip
        shift = len(buffers) - begin
        dropped = set(block.dropped)
        for i in sorted(i for op in range(begin, stop) for i in self.made_at.get(op, ())):
            s = trace.storages[i]
            if i in dropped:
                now[i] = self.stays[i] = self._storage(s, number, s.alloc + shift, -1, kept=True)
            else:
                end = min((s.release if i in self.packs else s.free) + shift, length)
                now[i] = self._storage(s, number, s.alloc + shift, max(end, s.alloc + shift + 1))
        for op in trace.ops[begin:stop]:
            reads, writes = (tuple(now.get(s, s) for s in touched) for touched in (op.reads, op.writes))
            ops.append(op_of(op, "backward", reads, writes))
        return ops

    def write(self) -> Trace:
        trace, points = self.trace, self.points
        before = [0]
        for batch in self.batches:
            before.append(before[-1] + len(batch))

        moments = shifted(len(trace.ops), self.at, before)
        moment = moments.__getitem__

        def index(op: int) -> int:
            return moments[op + 1] - 1

        asked: dict[int, list[int]] = {}
        gone: dict[int, int] = {}
        for block, position in zip(self.found, self.at, strict=True):
            if block.source >= 0:
                asked.setdefault(block.source, []).append(position)
            gone.update(dict.fromkeys(block.dropped, points.end(block.call)[0]))
        saved = tuple(
            saved_at(
                t,
                t.storage,
                moment(t.packed_at),
                tuple(map(moment, sorted({*asked.get(i, ()), *t.unpacked_at}))),
            )
            for i, t in enumerate(trace.saved)
        )
        stays_until: dict[int, int] = {}  # what blocks take, by storage: until they have run again
        for number, block in enumerate(self.found):
            end = self.at[number] + before[number] + len(self.batches[number])
            for taken in block.held:
                stays_until[taken] = max(stays_until.get(taken, 0), end)
        first = {trace.saved[i].storage: min(positions) for i, positions in asked.items()}
        storages = []
        for i, s in enumerate(trace.storages):
            need = moment(min(s.need, first.get(i, s.need))) if s.need >= 0 else -1
            alloc, release, free = index(s.alloc) if s.alloc >= 0 else -1, moment(s.release), moment(s.free)
            if i in self.stays:
                release = free = moment(max(s.release, gone[i]))
                need = -1
            if i in stays_until:
                release, free = max(release, stays_until[i]), max(free, stays_until[i])
            storages.append(stored_at(s, alloc, release, need, free))
        source = {new: old for old, new in self.stays.items()}
        for i, ((number, begin, end), s) in enumerate(zip(self.life, self.new, strict=True), len(trace.storages)):
            start = self.at[number] + before[number]
            free = start + end if end >= 0 else moment(trace.storages[source[i]].free)
            storages.append(stored_at(s, start + begin, free, -1, free))
        ops: list[Op] = []
        batches = {position: number for number, position in enumerate(self.at)}
        if len(batches) < len(self.at):
            raise PlanMismatchError(f"two blocks of {trace.model} would run again at one moment: plan one of them")
        stays, forward_end = self.stays, trace.forward_end
        for i, op in enumerate(trace.ops):
            if i in batches:
                ops += self.batches[batches[i]]
            if i >= forward_end and not (stays.keys().isdisjoint(op.reads) and stays.keys().isdisjoint(op.writes)):
                reads, writes = (tuple(stays.get(s, s) for s in touched) for touched in (op.reads, op.writes))
                op = op_of(op, op.phase, reads, writes)
            ops.append(op)
        modules = tuple(
            call_at(call, call.forward_begin, call.forward_end, moment(call.backward_begin), moment(call.backward_end))
            if call.backward_begin >= 0
            else call
            for call in trace.modules
        )
        step = replace(trace, ops=tuple(ops), storages=tuple(storages), saved=saved, modules=modules)
        if self.checked:
            step.check()
        return step
