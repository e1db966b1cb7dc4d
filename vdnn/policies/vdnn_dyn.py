"""Decides by profiling, in the order of the paper (section III-C): the fastest that fits is adopted.

    pass 1   all(m), the least memory: if that does not fit, the network cannot be trained
    pass 2   none(p), else conv(p), else all(p): the fastest algorithms, more and more offload
    pass 3   greedy conv, then greedy all: from the fastest, a layer whose algorithm overflows takes the next slower
             one that fits, down to implicit GEMM
    pass 4   all(m), which pass 1 found to fit

A pass fits if the bytes live during every op stay within the budget. Peak memory depends on program order alone,
so nothing has to be run to profile it; times come from the table of algorithms. Without a table the passes differ
in what they offload only, and there is nothing to downgrade.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vdnn.analysis.convolutions import Direction, choose, conv_ops, with_workspaces
from vdnn.analysis.liveness import op_text, requested
from vdnn.analysis.moments import resolve
from vdnn.errors import InfeasibleError
from vdnn.policies.algorithms import NO_TABLE, with_offers
from vdnn.policies.none import none
from vdnn.policies.options import Options
from vdnn.policies.registry import Policy, register
from vdnn.policies.vdnn_all import vdnn_all
from vdnn.policies.vdnn_conv import vdnn_conv
from vdnn.units import format_bytes
from vdnn.values.algorithms import IMPLICIT_GEMM, Offer
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["Decision", "decide_dyn", "vdnn_dyn"]

_OFFLOADS: dict[str, Policy] = {"none": none, "conv": vdnn_conv, "all": vdnn_all}


@dataclass(frozen=True, slots=True)
class Decision:
    """The pass adopted ("none(p)", "greedy conv", …), its plan, and every step of the decision in words."""

    chosen: str
    plan: Plan
    log: tuple[str, ...]


def decide_dyn(trace: Trace, hardware: Hardware, options: Options) -> Decision:
    """Go through the passes.

    Raises:
        InfeasibleError: all(m) does not fit; names what it needs.
    """
    return _Passes(trace, hardware, options).decide()


@register("vdnn-dyn")
def vdnn_dyn(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Offloads as little as fits: nothing, what convolutions save, or all; its notes are the log of the decision."""
    return decide_dyn(trace, hardware, options).plan


class _Passes:
    def __init__(self, trace: Trace, hardware: Hardware, options: Options) -> None:
        self.trace = trace
        self.hardware = hardware
        self.options = options
        self.budget = options.budget_bytes or hardware.available_bytes
        self.peak = hardware.peak("float32")
        self.log: list[str] = []
        self.plans: dict[str, Plan] = {}
        self.live: dict[str, list[int]] = {}

    def decide(self) -> Decision:
        if not self._fits(1, "all(m)"):
            over = self._most("all(m)", self._algorithms("least"))
            raise InfeasibleError(
                f"vdnn-dyn has no plan with which {self.trace.model} (batch {self.trace.batch}) fits into "
                f"{format_bytes(self.budget)}: even with everything offloaded it needs {format_bytes(over[0])}, at "
                f"{op_text(self.trace, over[1])}; give it that much, or a smaller batch"
            )
        for name in ("none(p)", "conv(p)", "all(p)"):
            if self._fits(2, name):
                return self._adopt(name, self._algorithms("fastest"), "fastest")
        for name in ("conv", "all") if self.options.table else ():
            found = self._greedy(name)
            if found is not None:
                return self._adopt(f"greedy {name}", found, "mixed")
        self.log.append("pass 4: all(m), as in pass 1")
        return self._adopt("all(m)", self._algorithms("least"), "least")

    # -- trials ------------------------------------------------------------------------------------

    def _algorithms(self, which: str) -> dict[Direction, Offer]:
        table = self.options.table
        if table is None:
            return {}
        return choose(self.trace, table, self.peak, "least" if which == "least" else "fastest")

    def _prepare(self, offload: str) -> None:
        """The plan of one way to offload, and what lives during each op without the convolutions' workspaces."""
        if offload not in self.plans:
            plan = self.plans[offload] = _OFFLOADS[offload](self.trace, self.hardware, self.options)
            bare = self.trace
            if self.options.table:
                empty = Offer("", 0, 0)
                bare = with_workspaces(bare, {op: empty for ops in conv_ops(bare).values() for op in ops})
            self.live[offload] = requested(bare, resolve(plan, bare))

    def _needs(self, op: int, algorithm: str) -> int:
        """The workspace of one op with an algorithm; the two gradients of a layer may need different ones."""
        table = self.options.table
        if table is None:
            return 0
        offers = table.offers(self.trace.ops[op], self.peak)
        return next((o.workspace_bytes for o in offers if o.algorithm == algorithm), 0)

    def _most(self, name: str, chosen: Mapping[Direction, Offer]) -> tuple[int, int]:
        """The most bytes that live during an op, and which."""
        offload = name.partition("(")[0]
        self._prepare(offload)
        live = list(self.live[offload])
        for direction, ops in conv_ops(self.trace).items():
            if direction in chosen:
                for op in ops:
                    live[op] += self._needs(op, chosen[direction].algorithm)
        most = max(live, default=0)
        return most, live.index(most) if live else -1

    def _fits(self, number: int, name: str) -> bool:
        most, op = self._most(name, self._algorithms("least" if name.endswith("(m)") else "fastest"))
        verdict = "fits" if most <= self.budget else f"{format_bytes(most - self.budget)} over"
        self.log.append(
            f"pass {number}: {name} needs {format_bytes(most)} of {format_bytes(self.budget)}: {verdict}"
            + ("" if most <= self.budget else f", at {op_text(self.trace, op)}")
        )
        return most <= self.budget

    def _greedy(self, offload: str) -> dict[Direction, Offer] | None:
        """The fastest algorithm that fits, for each convolution; None if some op does not fit at all."""
        table = self.options.table
        assert table is not None
        self._prepare(offload)
        live = self.live[offload]
        for op, nbytes in enumerate(live):
            if nbytes > self.budget:
                self.log.append(
                    f"pass 3: {offload}, {op_text(self.trace, op)} is {format_bytes(nbytes - self.budget)} over "
                    "without any workspace: given up"
                )
                return None
        found: dict[Direction, Offer] = {}
        for (module, backward), ops in conv_ops(self.trace).items():
            offers = table.offers(self.trace.ops[ops[0]], self.peak)
            needs = [max(live[op] + self._needs(op, o.algorithm) for op in ops) for o in offers]
            place = next(i for i, nbytes in enumerate(needs) if nbytes <= self.budget)
            found[module, backward] = offers[place]
            if place:
                over = needs[0] - self.budget
                name = found[module, backward].algorithm
                shown = "implicit GEMM" if name == IMPLICIT_GEMM else name
                self.log.append(
                    f"pass 3: {offload}, layer {self.trace.modules[module].fqn}{' (backward)' if backward else ''} "
                    f"downgraded from {offers[0].algorithm} to {shown}, {format_bytes(over)} over"
                )
        self.log.append(f"pass 3: {offload}, every layer fits now")
        return found

    def _adopt(self, name: str, chosen: Mapping[Direction, Offer], which: str) -> Decision:
        plan = self.plans[name.partition("(")[0].removeprefix("greedy ")]
        self.log.append(f"adopted: {name}")
        notes = [f"vdnn-dyn chose {name}", *self.log]
        level = "least" if which == "least" else "fastest" if which == "fastest" else "mixed"
        table = self.options.table
        if table is None:
            notes.append(NO_TABLE.format(gpu=self.hardware.id))
            made = replace(plan, policy="vdnn-dyn", workspace=level)  # type: ignore[arg-type]
        else:
            made = with_offers(plan, "vdnn-dyn", self.trace, chosen, table.id, level)  # type: ignore[arg-type]
        made = replace(made, budget_bytes=self.options.budget_bytes, notes=(*notes, *plan.notes))
        return Decision(name, made, tuple(self.log))
