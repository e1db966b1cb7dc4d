"""What a cheap module makes is dropped and made again from the module's input; the rest stays, or goes to the host.

Activations, norms, pools and resampling cost one pass over memory, and their inputs are saved anyway: a batch norm
and the ReLU behind it come again from the convolution's output (as in In-Place ABN, Rota Bulò et al., CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

from vdnn.analysis.blocks import block_actions, repeated
from vdnn.analysis.chains import Chain, action_of, chains
from vdnn.analysis.moments import Points
from vdnn.analysis.recomputing import recompute
from vdnn.policies.candidates import Saved, survey
from vdnn.policies.event_rules import event_actions, needed_soon
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Action, Offload, Plan, Recompute
from vdnn.values.trace import Trace

__all__ = ["recompute_blocks", "recompute_cheap", "recompute_offload"]


@register("recompute")
def recompute_cheap(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Drops what cheap modules make again, and offloads nothing."""
    saved = survey(trace, options)
    dropped, found = _droppable(trace, saved)
    kept = {item.storage: item.why or "no cheap module makes it from what is saved" for item in saved}
    return make_plan("recompute", trace, options, _again(trace, dropped, found), kept, notes=(_note(dropped),))


@register("recompute-offload")
def recompute_offload(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Drops what cheap modules make again, and offloads the rest."""
    saved = survey(trace, options)
    dropped, found = _droppable(trace, saved)
    again = {item.storage: found[item.storage] for item in dropped}
    step = recompute(trace, again, (), again)
    left = [item for item in survey(step, options) if item.storage < len(trace.storages)]
    kept = {item.storage: item.why for item in saved}
    kept.update({item.storage: item.why for item in left if item.storage not in again})
    movable = [item for item in left if item.movable]
    soon = needed_soon(step, hardware, movable) if options.keep_soon else set()
    kept.update(dict.fromkeys(soon, "backward needs it before its copy out could be over"))
    moves, inflight = event_actions(step, [item for item in movable if item.storage not in soon], options)
    actions: dict[int, Offload | Recompute] = {**moves, **_again(trace, dropped, found)}
    return make_plan("recompute-offload", trace, options, actions, kept, inflight, (_note(dropped),))


@register("recompute-blocks")
def recompute_blocks(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Lets go of all that a model's repeated blocks save, and runs each block again from its input."""
    points = Points(trace)
    saved = survey(trace, options)
    actions: dict[int, Action] = {}
    found = repeated(trace)
    for block in found:
        actions.update(block_actions(points, block, "its block runs again"))
    kept = {item.storage: item.why or "outside of repeated blocks, or an input of one" for item in saved}
    dropped = sum(trace.storages[s].nbytes for s in actions)
    note = f"runs {len(found)} blocks again, {format_bytes(dropped)}"
    return make_plan("recompute-blocks", trace, options, actions, kept, notes=(note,))


def _droppable(trace: Trace, saved: Sequence[Saved]) -> tuple[list[Saved], dict[int, Chain]]:
    found = chains(trace)
    return [item for item in saved if item.movable and item.storage in found], found


def _again(trace: Trace, dropped: Sequence[Saved], found: dict[int, Chain]) -> dict[int, Offload | Recompute]:
    points = Points(trace)
    why = "a cheap module makes it again"
    return {item.storage: action_of(points, found[item.storage], why) for item in dropped}


def _note(dropped: Sequence[Saved]) -> str:
    return f"computes {len(dropped)} feature maps again, {format_bytes(sum(item.nbytes for item in dropped))}"
