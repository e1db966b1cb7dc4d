"""Which saved storages their own modules can make again, and from what.

    chains(trace)[storage]    the calls of cheap modules that make it, one after the other, and the saved tensor
                              that the first of them takes
    chains(trace, costly=True)    those of convolutions and matrix products, too

Cheap is a module that, with all modules inside it, only normalises, activates, pools or resamples: its output costs a
pass over memory, its input is saved anyway. A batch norm and the ReLU in place behind it are a chain of two. Costly is
a layer without modules inside it that does arithmetic: it is made again in full, as checkpointing does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vdnn.analysis.moments import Points
from vdnn.errors import PlanMismatchError
from vdnn.values.plan import Plan, Point, Recompute
from vdnn.values.trace import Op, Trace

__all__ = ["RANDOM", "Chain", "action_of", "chains", "makers", "planned_chains", "writes_others_buffers"]

# Words in the names of ops that draw random numbers.
RANDOM = (
    "dropout", "bernoulli", "rand", "normal_", "multinomial", "uniform_", "exponential_", "rrelu", "poisson",
    "geometric_", "cauchy_", "binomial", "gamma", "dirichlet",
)  # fmt: skip
# Those that draw them where they were asked to, which their names do not say.
_PERHAPS = ("scaled_dot_product", "flash_attention", "efficient_attention", "_rnn", "_lstm")

_CHEAP = ("norm", "elementwise", "pool", "reduce", "copy", "view", "other")
_LONGEST = 3


@dataclass(frozen=True, slots=True)
class Chain:
    """Module calls, their forward ops in order, and the saved tensor they start from; all as indexes in the trace."""

    calls: tuple[int, ...]
    ops: tuple[int, ...]
    source: int


def makers(trace: Trace) -> dict[int, list[int]]:
    """For each storage the forward ops that write it, in order."""
    found: dict[int, list[int]] = {}
    for i, op in enumerate(trace.ops[: trace.forward_end]):
        for s in op.writes:
            found.setdefault(s, []).append(i)
    return found


def writes_others_buffers(trace: Trace, ops: Iterable[Op], fqn: str) -> bool:
    """Whether ops of a module change buffers that are not its own: run again, it would change them a second time.

    That a batch norm writes its statistics is not in the form of the op, so it counts as a write that it reads them.
    """
    own = f"{fqn}."
    for op in ops:
        for s in (*op.writes, *op.reads) if "batch_norm" in op.name else op.writes:
            if trace.storages[s].category == "buffer" and not trace.storages[s].name.startswith(own):
                return True
    return False


def chains(trace: Trace, *, costly: bool = False) -> dict[int, Chain]:
    """The chain of every saved storage that has one."""
    looked = _Looking(trace, costly)
    found = {}
    for storage in sorted({t.storage for t in trace.saved}):
        chain = looked.chain_of(storage)
        if chain is not None:
            found[storage] = chain
    return found


def action_of(points: Points, chain: Chain, why: str = "") -> Recompute:
    """The plan's action for a storage with this chain."""
    calls = tuple(f"{points.trace.modules[c].fqn}#{points.trace.modules[c].call}" for c in chain.calls)
    return Recompute(why, calls, str(points.names[chain.source]))


def planned_chains(plan: Plan, points: Points) -> dict[int, Chain]:
    """The chains that a plan names, by storage.

    Raises:
        PlanMismatchError: a call or a saved tensor that the trace does not have.
    """
    trace = points.trace
    own = _ops_of_calls(trace)
    found = {}
    for entry in plan.entries:
        action = entry.action
        if isinstance(action, Recompute) and action.through:
            calls = tuple(points.call(f"end {text}") for text in action.through)
            ops = tuple(sorted(op for call in calls for op in own[call]))
            source = Point.parse(f"pack {action.source}")
            number = points.saved_at(source.module, source.call, source.index)
            if number is None:
                raise PlanMismatchError(
                    f"the plan computes {entry.saved[0]} again from {action.source}, which {trace.model} does not pack"
                )
            made, taken = trace.saved[points.find(entry.saved[0])].storage, trace.saved[number].storage
            if not any(made in trace.ops[op].writes for op in ops) or not any(
                taken in trace.ops[op].reads for op in ops
            ):
                raise PlanMismatchError(
                    f"the plan computes {entry.saved[0]} again from {action.source} through "
                    f"{', '.join(action.through)}, which in {trace.model} take or make something else"
                )
            found[made] = Chain(calls, ops, number)
    return found


def _ops_of_calls(trace: Trace) -> list[list[int]]:
    """For each module call its forward ops and those of the calls inside it."""
    own: list[list[int]] = [[] for _ in trace.modules]
    for i, op in enumerate(trace.ops[: trace.forward_end]):
        call = op.module
        while call >= 0:
            own[call].append(i)
            call = trace.modules[call].parent
    return own


class _Looking:
    def __init__(self, trace: Trace, costly: bool) -> None:
        self.trace = trace
        self.costly = costly
        self.parents = {call.parent for call in trace.modules}
        self.made = makers(trace)
        self.own = _ops_of_calls(trace)
        self.packed: dict[int, list[int]] = {}  # module call → saved tensors packed in it
        for i, t in enumerate(trace.saved):
            call = t.module
            while call >= 0:
                self.packed.setdefault(call, []).append(i)
                call = trace.modules[call].parent
        self.readers: dict[int, set[int]] = {}  # storage → forward ops that read it
        for i, op in enumerate(trace.ops[: trace.forward_end]):
            for s in op.reads:
                self.readers.setdefault(s, set()).add(i)
        self.last_write: dict[int, int] = {}
        for i, op in enumerate(trace.ops):
            for s in op.writes:
                self.last_write[s] = i

    def chain_of(self, storage: int) -> Chain | None:
        """The shortest chain that makes a storage and starts from a saved tensor; None if there is none."""
        trace, s = self.trace, self.trace.storages[storage]
        ops = self.made.get(storage)
        if s.category != "activation" or s.held or s.need < 0 or s.release >= s.need or not ops:
            return None
        if all(self._copies_weights(i) for i in ops):
            return None  # of a layer that is called again, which takes the copy of its first call
        calls = self._outermost({trace.ops[i].module for i in ops})
        if calls[0] < 0 or self.readers.get(storage, set()) <= {i for call in calls for i in self.own[call]}:
            return None  # no module's output, but something beside it: a norm's statistics, a pool's indices
        while len(calls) <= _LONGEST:
            if not all(self._allowed(call) for call in calls):
                return None
            inside = [i for call in calls for i in self.own[call]]
            if inside != sorted(inside) or any(i not in inside for i in ops):
                return None
            outer = self._taken(inside)
            source = self._source(calls[0], outer, storage, inside)
            if source is not None:
                return Chain(tuple(calls), tuple(inside), source)
            before = {trace.ops[i].module for taken in outer for i in self.made.get(taken, ())}
            if len(outer) != 1 or len(before) != 1 or min(before) < 0 or min(before) >= calls[0]:
                return None
            calls = self._outermost({*calls, *before})
        return None

    def _outermost(self, calls: set[int]) -> list[int]:
        """The calls without those that are inside another of them."""

        def inside(call: int) -> bool:
            call = self.trace.modules[call].parent if call >= 0 else -1
            return call >= 0 and (call in calls or inside(call))

        return sorted(call for call in calls if not inside(call))

    def _allowed(self, call: int) -> bool:
        if call < 0 or not self.own[call]:
            return False
        ops = [self.trace.ops[i] for i in self.own[call]]
        if any(word in op.name for op in ops for word in (*RANDOM, *_PERHAPS)) or self._gives_more(call):
            return False
        if writes_others_buffers(self.trace, ops, self.trace.modules[call].fqn):
            return False
        return all(op.kernel in _CHEAP for op in ops) or (self.costly and call not in self.parents)

    def _gives_more(self, call: int) -> bool:
        """Whether forward still holds more than one storage that the call made, when it is over: a tuple, as of a pool
        with `return_indices`. Such a call is not made again.
        """
        first, end = self.own[call][0], self.trace.modules[call].forward_end
        made = {
            s
            for i in self.own[call]
            for s in self.trace.ops[i].writes
            if self.trace.storages[s].alloc >= first and not self._copies_weights(i)
        }
        return sum(self.trace.storages[s].release > end for s in made) > 1

    def _copies_weights(self, op: int) -> bool:
        """Whether it is autocast's copy of a weight, which lives until forward ends, and which no layer gives."""
        reads = self.trace.ops[op].reads
        return self.trace.ops[op].name.startswith("aten._to_copy") and all(
            self.trace.storages[s].category in ("parameter", "buffer") for s in reads
        )

    def _taken(self, inside: Sequence[int]) -> set[int]:
        """What the ops read that they do not make themselves, weights and buffers aside."""
        made: set[int] = set()
        taken: set[int] = set()
        for i in inside:
            op = self.trace.ops[i]
            for s in op.reads:
                fixed = self.trace.storages[s].category in ("parameter", "buffer")
                if s not in made and not fixed and (s not in op.writes or self.trace.storages[s].alloc < i):
                    taken.add(s)
            made.update(op.writes)
        return taken

    def _source(self, first: int, outer: set[int], storage: int, inside: Sequence[int]) -> int | None:
        """The saved tensor from which the first call starts, if it is all that the ops take."""
        trace = self.trace
        if len(outer) != 1:
            return None
        taken = next(iter(outer))
        s = trace.storages[taken]
        if taken == storage or self.last_write.get(taken, -1) >= inside[0]:
            return None
        need = trace.storages[storage].need
        for i in self.packed.get(first, ()):
            t = trace.saved[i]
            if t.storage == taken and t.unpacked_at and s.alloc <= need < s.free:
                return i
        return None
