"""What a search may change in a step, and the step that comes of it: blocks, chains and codes, mixed freely.

    base       the step in which some blocks run again: what is saved in it, and which chains and codes are possible
    settled    a choice without what may not be together: a chain in a block, a code for what something starts from
    made       the step of a choice, as `vdnn.analysis.encoding.planned` has it, and what of it may be offloaded

Everything is named by the storages and module calls of the trace itself, whatever the numbers in the step made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vdnn.analysis.blocks import Block, block_actions, blocks, run_again
from vdnn.analysis.chains import Chain, action_of, chains
from vdnn.analysis.encodable import elements_of, encodable
from vdnn.analysis.encoding import code_ops, encode
from vdnn.analysis.moments import Points
from vdnn.analysis.recomputing import recompute
from vdnn.costs import times_with
from vdnn.errors import PlanMismatchError
from vdnn.planner.schedule import Parcel, Schedule, Step
from vdnn.policies import Options
from vdnn.policies.candidates import Saved, survey
from vdnn.policies.plans import make_plan
from vdnn.units import format_ns
from vdnn.values.codes import code_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Action, Encode, Plan
from vdnn.values.trace import Trace

__all__ = ["Base", "Choice", "Choices", "Made"]

_KNOWN = 64  # steps that are remembered
_BASES = 24


@dataclass(frozen=True, slots=True)
class Choice:
    """Module calls that run again as blocks, storages that codes stand for, and storages that chains make again."""

    blocks: frozenset[int] = frozenset()
    coded: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Base:
    """The step in which some blocks run again; `sources` are the storages that they start from."""

    trace: Trace
    movable: dict[int, Saved]
    chains: dict[int, Chain]
    sources: frozenset[int]


@dataclass(frozen=True, slots=True)
class Made:
    """The step of a choice, what of it may be offloaded by the trace's own storages, and back from its storages."""

    step: Step
    parcels: dict[int, Parcel]
    origin: dict[int, int]


class Choices:
    """The choices there are for one step on one machine; keeps the steps that were made last."""

    def __init__(self, trace: Trace, hardware: Hardware, options: Options) -> None:
        self.trace = trace
        self.hardware = hardware
        self.options = options
        self.op_ns = times_with(trace, hardware, {}, "")
        self.saved = survey(trace, options)
        self.movable = {item.storage: item for item in self.saved if item.movable}
        self.blocks = {c: block for c, block in blocks(trace).items() if any(s in self.movable for s in block.dropped)}
        self.block_ns = {c: sum(self.op_ns[slice(*self._again(block))]) for c, block in self.blocks.items()}
        codes = encodable(trace)
        self.codes = {s: codes[s] for s in self.movable if s in codes}
        ops, own = code_ops(trace, self.codes)
        times = times_with(ops, hardware, {}, "")
        self.code_ns = {s: sum(times[i] for i in own[s]) for s in self.codes}
        self.saving = {}  # bytes that a code leaves free
        for s, how in self.codes.items():
            dtype = trace.saved[self.movable[s].tensors[0]].dtype
            self.saving[s] = self.movable[s].nbytes - code_bytes(how, elements_of(trace, s, dtype))
        self._bases: dict[frozenset[int], Base | None] = {}
        self._made: dict[Choice, Made] = {}
        self.work = 0
        whole = self.base(frozenset())
        assert whole is not None
        self.chains = whole.chains
        self.again_ns = {s: sum(self.op_ns[op] for op in chain.ops) for s, chain in self.chains.items()}
        light = chains(trace)
        self.light = frozenset(s for s in self.chains if s in light)  # without layers that do arithmetic

    def _again(self, block: Block) -> tuple[int, int]:
        """The forward ops that run again, to the last pack that is needed."""
        last = max(t.packed_at for t in self.trace.saved if t.storage in set(block.dropped))
        return self.trace.modules[block.call].forward_begin, last

    def inside(self, call: int) -> Iterator[int]:
        """A module call and those that it is in."""
        while call >= 0:
            yield call
            call = self.trace.modules[call].parent

    def levels(self) -> list[list[int]]:
        """Blocks beside each other, in forward's order: the outermost, those inside them, and so on."""
        depth: dict[int, int] = {}
        for c in self.blocks:
            outer = next((o for o in self.inside(self.trace.modules[c].parent) if o in self.blocks), None)
            depth[c] = 0 if outer is None else depth[outer] + 1
        leaves = set(self.blocks) - {o for c in self.blocks for o in self.inside(self.trace.modules[c].parent)}
        found = []
        for level in range(max(depth.values(), default=-1) + 1):
            found.append([c for c in self.blocks if depth[c] == level or (depth[c] < level and c in leaves)])
        return found

    def parts(self, call: int) -> list[int]:
        """The outermost blocks inside this one that are smaller than it."""
        inside = [c for c in self.blocks if c != call and call in self.inside(c)]
        smaller = {c for c in inside if len(self.blocks[c].dropped) < len(self.blocks[call].dropped)}
        return [c for c in inside if c in smaller and not smaller & set(self.inside(self.trace.modules[c].parent))]

    def beside(self, chosen: frozenset[int], call: int) -> frozenset[int]:
        """The blocks with this one, and without those in it or around it."""
        around = set(self.inside(call))
        return frozenset(c for c in chosen if c not in around and call not in self.inside(c)) | {call}

    def base(self, chosen: frozenset[int]) -> Base | None:
        """The step in which these blocks run again; None where they cannot all."""
        if chosen in self._bases:
            return self._bases[chosen]
        try:
            trace = run_again(self.trace, [self.blocks[c] for c in sorted(chosen)], checked=False)
        except PlanMismatchError:
            self._bases[chosen] = None
            return None
        self.work += 4 * len(trace.ops)
        movable = {item.storage: item for item in survey(trace, self.options) if item.movable}
        sources = frozenset(trace.saved[i].storage for c in chosen if (i := self.blocks[c].source) >= 0)
        possible = {}
        for s, chain in chains(trace, costly=True).items():
            calls = {outer for call in chain.calls for outer in self.inside(call)}
            if s in movable and s not in sources and not calls & chosen:
                possible[s] = chain
        base = Base(trace, movable, possible, sources)
        if len(self._bases) > _BASES:
            self._bases.clear()
        self._bases[chosen] = base
        return base

    def settled(self, choice: Choice) -> Choice | None:
        """The choice without what its blocks and chains do not allow; None where the blocks cannot all run again."""
        base = self.base(choice.blocks)
        if base is None:
            return None
        dropped = frozenset(s for s in choice.dropped if s in base.chains)
        starts = base.sources | {base.trace.saved[base.chains[s].source].storage for s in dropped}
        coded = frozenset(
            s for s in choice.coded if s in self.codes and s in base.movable and s not in dropped and s not in starts
        )
        return Choice(choice.blocks, coded, dropped)

    def made(self, choice: Choice) -> Made:
        """The step of a settled choice."""
        known = self._made.get(choice)
        if known is not None:
            return known
        base = self.base(choice.blocks)
        assert base is not None
        trace, origin = base.trace, {}
        if choice.dropped:
            trace = recompute(trace, choice.dropped, (), {s: base.chains[s] for s in choice.dropped}, checked=False)
        if choice.coded:
            trace = encode(trace, {s: self.codes[s] for s in sorted(choice.coded)}, checked=False)
        self.work += 4 * len(trace.ops)
        step = Step(
            trace, self.hardware, self.op_ns if trace is self.trace else times_with(trace, self.hardware, {}, "")
        )
        parcels = {}
        for item in survey(trace, self.options):
            storage = self.trace.saved[item.tensors[0]].storage
            shapeless = storage in choice.coded and self.codes[storage] == "shape"
            if item.movable and storage not in choice.dropped and not shapeless:
                parcel = step.parcel(item)
                if parcel is not None:
                    parcels[storage] = parcel
                    origin[item.storage] = storage
        if len(self._made) > _KNOWN:
            self._made.clear()
        self._made[choice] = made = Made(step, parcels, origin)
        return made

    # -- as a plan -----------------------------------------------------------------------------------

    def plan(self, choice: Choice, schedule: Schedule) -> Plan:
        """The choice and its offloads as a plan."""
        points, origin, base = Points(self.trace), self.made(choice).origin, self.base(choice.blocks)
        assert base is not None
        actions: dict[int, Action] = {}
        for c in sorted(choice.blocks):
            actions.update(block_actions(points, self.blocks[c], f"its block takes {format_ns(self.block_ns[c])}"))
        for s in choice.dropped:
            actions[s] = action_of(points, base.chains[s], self._why(s, sum(self.op_ns[i] for i in base.chains[s].ops)))
        for s in choice.coded:
            actions[s] = Encode(self.codes[s], self._why(s, self.code_ns[s]))
        for number, move in schedule.actions.items():
            s = origin[number]
            known = actions.get(s)
            if isinstance(known, Encode):
                actions[s] = replace(known, release_at=move.release_at, prefetch_at=move.prefetch_at)
            else:
                actions[s] = move
        kept = {item.storage: item.why or "the budget does not ask for it" for item in self.saved}
        return make_plan("budget", self.trace, self.options, actions, kept)

    def _why(self, storage: int, takes_ns: int) -> str:
        link = self.movable[storage].nbytes * 10**9 // self.hardware.h2d_bytes_per_s
        return f"takes {format_ns(takes_ns)}; fetching it takes {format_ns(link)}"
