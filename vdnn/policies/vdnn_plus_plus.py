"""vDNN++ (Shriram, Garg, Kulkarni, IPDPS 2019): vDNN without the synchronisation at the end of each layer.

The same feature maps as `vdnn-all` by the paper's rules, the X of CONV and POOL layers; but compute goes on while a
copy is under way, and a map is released when its copy is over. Here, where the engine polls nothing: when more than
`max_inflight_bytes` are on their way (twice the largest map, if not given: one copy runs on while the next layer's
begins), compute waits for the oldest copy; copies back run ahead as far. Of vDNN++'s three improvements this is the
first; its memory pool and its compression are not modelled.
"""

from __future__ import annotations

from dataclasses import replace

from vdnn.policies.candidates import survey
from vdnn.policies.event_rules import event_actions
from vdnn.policies.options import Options
from vdnn.policies.paper_rules import feature_inputs
from vdnn.policies.plans import make_plan
from vdnn.policies.registry import register
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["vdnn_plus_plus"]


@register("vdnn++")
def vdnn_plus_plus(trace: Trace, hardware: Hardware, options: Options) -> Plan:
    """Offloads the inputs of CONV and POOL layers, or all where there are none; does not wait at each layer."""
    kinds = ("conv", "pool") if any(call.kind == "conv" for call in trace.modules) else ()
    inputs = feature_inputs(trace, kinds)
    saved = survey(trace, options)
    wanted = [item for item in saved if item.movable and (item.storage in inputs or not kinds)]
    kept = {item.storage: item.why or "not the input of a CONV or POOL layer" for item in saved}
    twice = 2 * max((item.nbytes for item in wanted), default=0)
    ahead = twice if options.window_bytes is None else options.window_bytes
    bound = twice if options.max_inflight_bytes is None else options.max_inflight_bytes
    choice = replace(options, max_inflight_bytes=bound, window_bytes=ahead)
    actions, inflight = event_actions(trace, wanted, choice)
    note = f"offloads {format_bytes(sum(item.nbytes for item in wanted))} in {len(wanted)} storages, event rules"
    return make_plan("vdnn++", trace, options, actions, kept, inflight, (note,))
