"""Codes stand for the feature maps of which backward needs only a sign, a mask or a form (Gist, ISCA 2018).

`encode` keeps the codes on the device and moves nothing. `encode-offload` sends what has no code to the host as
`vdnn-all` does, and the codes after it, which are 8 to 32 times smaller than what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vdnn.analysis.encodable import encodable
from vdnn.analysis.encoding import encoded
from vdnn.policies.candidates import Saved, survey
from vdnn.policies.event_rules import event_actions, needed_soon
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.units import format_bytes
from vdnn.values.codes import ITEM_BYTES, Code, code_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Action, Encode, Plan
from vdnn.values.trace import Trace

__all__ = ["encode", "encode_offload"]

_WHY = "backward needs no more of it"


@register("encode")
def encode(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Keeps codes (a sign, a mask, an index) in place of what they stand for, and offloads nothing."""
    saved = survey(trace, options)
    coded = _coded(trace, saved)
    kept = {item.storage: item.why or "a node of backward needs its values" for item in saved}
    actions: dict[int, Action] = {storage: Encode(how, _WHY) for storage, how in coded.items()}
    return make_plan("encode", trace, options, actions, kept, notes=(_note(trace, saved, coded),))


@register("encode-offload")
def encode_offload(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Encodes what can be, and offloads codes and all the rest."""
    saved = survey(trace, options)
    coded = _coded(trace, saved)
    actions: dict[int, Action] = {storage: Encode(how, _WHY) for storage, how in coded.items()}
    kept = {item.storage: item.why for item in saved}
    # the step with codes on the device: in it a code is a saved storage as any other, named by the same tensors
    step = encoded(trace, make_plan("encode", trace, options, actions, kept))
    original = {step.saved[i].storage: trace.saved[i].storage for i in range(len(trace.saved))}
    items = [replace(item, storage=original[item.storage]) for item in survey(step, options)]
    kept.update({item.storage: item.why for item in items if item.storage not in coded})
    left = [item for item in survey(step, options) if item.movable]
    soon = needed_soon(step, hardware, left) if options.keep_soon else set()
    kept.update({original[s]: "backward needs it before its copy out could be over" for s in soon})
    moves, inflight = event_actions(step, [item for item in left if item.storage not in soon], options)
    for number, move in moves.items():
        how = coded.get(original[number])
        if how is None:
            actions[original[number]] = move
        else:
            actions[original[number]] = Encode(how, _WHY, move.release_at, move.prefetch_at)
    return make_plan("encode-offload", trace, options, actions, kept, inflight, (_note(trace, saved, coded),))


def _coded(trace: Trace, saved: Sequence[Saved]) -> dict[int, Code]:
    found = encodable(trace)
    return {item.storage: found[item.storage] for item in saved if item.movable and item.storage in found}


def _note(trace: Trace, saved: Sequence[Saved], coded: Mapping[int, Code]) -> str:
    whole = stays = 0
    for item in saved:
        if item.storage in coded:
            whole += item.nbytes
            dtype = trace.saved[item.tensors[0]].dtype
            stays += code_bytes(coded[item.storage], item.nbytes // ITEM_BYTES[dtype])
    return f"encodes {len(coded)} feature maps, {format_bytes(whole)} as {format_bytes(stays)}"
