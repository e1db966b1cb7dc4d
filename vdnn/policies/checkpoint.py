"""Recompute the repeated blocks instead of keeping what they save; offload their inputs, too, or not.

The step itself is another one: blocks run under `torch.utils.checkpoint`, so a trace has their forward a second
time in its backward. Such a trace comes from the model option `checkpoint=blocks`, or from a model that
checkpoints by itself.
"""

from __future__ import annotations

from dataclasses import replace

from vdnn.errors import UsageError
from vdnn.policies.candidates import Saved
from vdnn.policies.feature_maps import offload_maps
from vdnn.policies.options import Options
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["checkpoint", "checkpoint_offload", "recomputed_blocks"]


def recomputed_blocks(trace: Trace) -> set[int]:
    """Module calls that are recomputed: they save something themselves, and the calls inside them save nothing."""
    saves = {t.module for t in trace.saved}
    inner: dict[int, bool] = {}  # calls with calls inside: whether one of those saves
    for number in range(len(trace.modules) - 1, -1, -1):
        parent = trace.modules[number].parent
        if parent >= 0:
            inner[parent] = inner.get(parent, False) or number in saves or inner.get(number, False)
    again = {op.module for op in trace.ops if op.phase == "backward" and op.flops}
    return {call for call, saving in inner.items() if call in saves and not saving and _under(trace, call, again)}


def _under(trace: Trace, call: int, calls: set[int]) -> bool:
    """Whether one of those calls is this one or inside it."""
    for number in calls:
        while number >= 0:
            if number == call:
                return True
            number = trace.modules[number].parent
    return False


def _blocks(trace: Trace, policy: str) -> set[int]:
    blocks = recomputed_blocks(trace)
    if not blocks:
        raise UsageError(
            f"policy {policy}: the step of {trace.model} recomputes no block: load the model with the option "
            "checkpoint=blocks, or name the blocks (checkpoint='layers.*')"
        )
    return blocks


@register("checkpoint", checkpoint="blocks")
def checkpoint(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Runs the model's repeated blocks again (torch's checkpoint); keeps their inputs, and what is outside of them."""
    blocks = _blocks(trace, "checkpoint")
    why = dict.fromkeys((t.storage for t in trace.saved), "recomputation is what this policy does")
    return make_plan("checkpoint", trace, options, {}, why, notes=(f"recomputes {len(blocks)} blocks",))


@register("checkpoint-offload", checkpoint="blocks")
def checkpoint_offload(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """The same, with the blocks' inputs on the host."""
    blocks = _blocks(trace, "checkpoint-offload")
    inputs = {t.storage for t in trace.saved if t.module in blocks}

    def refuse(item: Saved) -> str:
        return "" if item.storage in inputs else "not the input of a recomputed block"

    choice = replace(options, rules="event")
    notes = (f"recomputes {len(blocks)} blocks",)
    return offload_maps("checkpoint-offload", trace, hardware, choice, refuse, (), notes)
