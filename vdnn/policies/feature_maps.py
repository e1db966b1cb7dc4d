"""What `vdnn-all` and `vdnn-conv` share: they differ only in which feature maps they want."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vdnn.policies.candidates import Saved, survey
from vdnn.policies.event_rules import event_actions, needed_soon
from vdnn.policies.options import Options
from vdnn.policies.paper_rules import feature_inputs, paper_actions
from vdnn.policies.plans import make_plan
from vdnn.units import format_bytes
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.trace import Trace

__all__ = ["offload_maps"]


def offload_maps(
    policy: str,
    trace: Trace,
    hardware: Hardware,
    options: Options,
    refuse: Callable[[Saved], str],
    kinds: Sequence[str],
    notes: tuple[str, ...] = (),
) -> Plan:
    """A plan that offloads what `refuse` gives no reason against; the paper's rules want layers of `kinds`."""
    saved = survey(trace, options)
    kept = {item.storage: item.why for item in saved if not item.movable}
    consumers = feature_inputs(trace, kinds) if options.rules == "paper" else {}
    wanted = []
    for item in saved:
        if not item.movable:
            continue
        why = refuse(item)
        if options.rules == "paper" and item.storage not in consumers:
            why = f"not the input of a {' or '.join(kinds)} layer"
        if why:
            kept[item.storage] = why
        else:
            wanted.append(item)
    inflight = None
    if options.rules == "paper":
        offloaded = paper_actions(trace, wanted, consumers)
    else:
        if options.keep_soon:
            for storage in needed_soon(trace, hardware, wanted):
                kept[storage] = f"needed before its copy out over the link of {hardware.id} could be over"
            wanted = [item for item in wanted if item.storage not in kept]
        offloaded, inflight = event_actions(trace, wanted, options)
    sizes = [item.nbytes for item in saved if item.why == "" or trace.storages[item.storage].category == "activation"]
    in_all = f"{format_bytes(sum(sizes))} of saved feature maps"
    moved = sum(item.nbytes for item in wanted)
    share = f"offloads {format_bytes(moved)} in {len(wanted)} storages of {in_all}"
    if not wanted:
        small = max(sizes, default=0) < options.min_bytes
        share = f"offloads none of {in_all}" + (f": each is below {format_bytes(options.min_bytes)}" if small else "")
    return make_plan(policy, trace, options, offloaded, kept, inflight, (*notes, f"{share}, {options.rules} rules"))
