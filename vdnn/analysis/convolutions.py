"""Which algorithm each convolution of a step runs with, and what follows for time and workspace.

    choices = choose(trace, table, peak, "fastest")     the paper's (p); "least" is its (m)
    chosen = offers_of(plan, trace, peak)               op → its algorithm's time and workspace
    with_workspaces(trace, chosen)                      the same step with those workspaces

The algorithm is chosen by layer and direction; in backward it serves the weights' gradient and the input's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from vdnn.errors import PlanMismatchError
from vdnn.values.algorithms import AlgorithmTable, Offer, algorithm_table
from vdnn.values.plan import ConvChoice, Plan
from vdnn.values.trace import Trace

__all__ = ["Direction", "choices_of", "choose", "conv_ops", "offers_of", "traffic_ops", "with_workspaces"]

# A module call, and whether it is its backward.
Direction = tuple[int, bool]
_BY_TRAFFIC = ("pool", "elementwise", "reduce", "copy", "norm")


def conv_ops(trace: Trace) -> dict[Direction, list[int]]:
    """The convolutions of each module call and direction, in order."""
    found: dict[Direction, list[int]] = {}
    for i, op in enumerate(trace.ops):
        if op.kernel == "conv" and op.module >= 0 and len(op.dims) >= 7:
            found.setdefault((op.module, op.phase == "backward"), []).append(i)
    return found


def choose(
    trace: Trace, table: AlgorithmTable, peak: int, which: Literal["least", "fastest"]
) -> dict[Direction, Offer]:
    """For every convolution the algorithm without workspace, or the fastest."""
    place = -1 if which == "least" else 0
    return {direction: table.offers(trace.ops[ops[0]], peak)[place] for direction, ops in conv_ops(trace).items()}


def choices_of(trace: Trace, chosen: Mapping[Direction, Offer]) -> tuple[ConvChoice, ...]:
    """The choice as a plan writes it down, in the order of the module calls."""
    calls = sorted({module for module, _ in chosen})

    def name(module: int, backward: bool) -> str:
        offer = chosen.get((module, backward))
        return offer.algorithm if offer else ""

    return tuple(ConvChoice(trace.modules[m].fqn, trace.modules[m].call, name(m, False), name(m, True)) for m in calls)


def offers_of(plan: Plan | None, trace: Trace, peak: int) -> dict[int, Offer]:
    """What the plan's algorithms take, by op; empty for a plan that leaves them to the library.

    Raises:
        PlanMismatchError: the plan names an algorithm that its table does not have for that convolution.
    """
    if plan is None or not plan.algorithm_table:
        return {}
    table = algorithm_table(plan.algorithm_table)
    wanted = {(c.module, c.call): (c.forward, c.backward) for c in plan.convolutions}
    found: dict[int, Offer] = {}
    for (module, backward), ops in conv_ops(trace).items():
        call = trace.modules[module]
        name = wanted.get((call.fqn, call.call), ("", ""))[backward]
        for op in ops if name else ():
            offers = {offer.algorithm: offer for offer in table.offers(trace.ops[op], peak)}
            if name not in offers:
                raise PlanMismatchError(
                    f"the plan runs {call} with {name}, which {table.id} has not for it: {', '.join(offers)}"
                )
            found[op] = offers[name]
    return found


def traffic_ops(trace: Trace) -> list[int]:
    """The ops whose time is that of their DRAM traffic: pooling, activations, copies."""
    return [i for i, op in enumerate(trace.ops) if op.kernel in _BY_TRAFFIC]


def with_workspaces(trace: Trace, chosen: Mapping[int, Offer]) -> Trace:
    """The step with the workspaces of these algorithms."""
    if not chosen:
        return trace
    ops = [
        replace(op, workspace_bytes=chosen[i].workspace_bytes) if i in chosen else op for i, op in enumerate(trace.ops)
    ]
    return replace(trace, ops=tuple(ops))
