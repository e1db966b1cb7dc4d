"""When to release and when to fetch, bounded in bytes: the rules that events allow.

vDNN joins its streams at the end of every layer, so each layer costs max(compute, copy). Here compute waits
for the oldest copy only when more than `max_inflight_bytes` would be on their way out, and a copy back
starts as soon as it fits into a window of bytes, in the order of need:

    forward    at each pack: put the storage's copy on its way; while more than the bound is on its way,
               release the oldest that nothing but autograd holds any more; at the end of the model, all
    backward   at each first unpack: while the next storage to be needed fits into the window, fetch it
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vdnn.analysis.moments import Moment, Points
from vdnn.policies.candidates import Saved, inside
from vdnn.policies.options import Options
from vdnn.policies.plans import covers_half
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Offload
from vdnn.values.trace import Trace

__all__ = ["event_actions", "least_clock", "needed_soon"]


def least_clock(trace: Trace, hardware: Hardware) -> list[int]:
    """The time in ns at each position at the earliest, on a device that keeps to its datasheet.

    Kernels run at its peaks, none is shorter than `kernel_ns`, and none starts before the host has issued it, which
    takes `launch_ns` an op, half of that in backward, whose engine is no Python, and nothing for a view.
    """
    clock = [0]
    issued = 0
    for op in trace.ops:
        if op.kernel == "view":
            clock.append(clock[-1])
            continue
        issued += hardware.launch_ns // (2 if op.phase == "backward" else 1)
        compute = op.flops * 10**9 // hardware.peak(op.dtype)
        memory = (op.read_bytes + op.written_bytes) * 10**9 // hardware.dram_bytes_per_s
        clock.append(max(clock[-1], issued) + max(compute, memory, hardware.kernel_ns))
    return clock


def needed_soon(trace: Trace, hardware: Hardware, items: Sequence[Saved]) -> set[int]:
    """Storages that backward needs before their copy out alone could be over.

    The time between is that of `least_clock`, where nothing is slower than it must be. So what is saved last stays, as
    the last layer does in vDNN's followers: compute would wait for the copy, and no memory would be free for any time.
    """
    clock = least_clock(trace, hardware)
    soon = set()
    for item in items:
        out = hardware.link_latency_ns + item.nbytes * 10**9 // hardware.d2h_bytes_per_s
        first = min(trace.saved[i].packed_at for i in item.tensors)
        if clock[trace.storages[item.storage].need] - clock[first] < out:
            soon.add(item.storage)
    return soon


def event_actions(trace: Trace, items: Sequence[Saved], options: Options) -> tuple[dict[int, Offload], int]:
    """What to do with each of these storages, and the bound of bytes in flight that was used."""
    largest = max((item.nbytes for item in items), default=0)
    bound = largest if options.max_inflight_bytes is None else options.max_inflight_bytes
    window = largest if options.window_bytes is None else options.window_bytes
    points = Points(trace)
    releases = _releases(trace, points, items, bound)
    fetches = _fetches(trace, points, items, window)
    actions = {
        item.storage: Offload(
            releases[item.storage],
            fetches[item.storage],
            whole=covers_half(trace, item.storage, item.tensors),
        )
        for item in items
    }
    return actions, bound


def _releases(trace: Trace, points: Points, items: Sequence[Saved], bound: int) -> dict[int, str]:
    packed: dict[int, Saved] = {item.tensors[0]: item for item in items}
    free_from = {
        item.storage: max((trace.storages[item.storage].release, 0), points.pack(item.tensors[-1])) for item in items
    }
    found: dict[int, str] = {}
    on_way: deque[Saved] = deque()
    inflight = 0
    for moment, text, tensor in _forward_points(trace, points):
        if tensor in packed:
            on_way.append(packed[tensor])
            inflight += packed[tensor].nbytes
        if inflight <= bound:
            continue
        # oldest first; one that the forward itself still holds is passed over until it lets go
        for item in [item for item in on_way if free_from[item.storage] <= moment]:
            if inflight <= bound:
                break
            found[item.storage] = text
            on_way.remove(item)
            inflight -= item.nbytes
    roots = [i for i, call in enumerate(trace.modules) if call.parent < 0]
    for item in on_way:
        found[item.storage] = f"end {_call(trace, roots[-1])}"
    return found


def _forward_points(trace: Trace, points: Points) -> list[tuple[Moment, str, int]]:
    """Packs and ends of module calls in program order; the third says which saved tensor a pack is of."""
    found = [(points.pack(i), f"pack {points.names[i]}", i) for i in inside(trace)]
    found += [(points.end(i), f"end {_call(trace, i)}", -1) for i in range(len(trace.modules))]
    return sorted(found)


def _call(trace: Trace, call: int) -> str:
    return f"{trace.modules[call].fqn}#{trace.modules[call].call}"


def _fetches(trace: Trace, points: Points, items: Sequence[Saved], window: int) -> dict[int, str]:
    needs = []
    for item in items:
        asked = [moment for moment in map(points.unpack, item.tensors) if moment is not None]
        needs.append((min(asked), item))
    needs.sort(key=lambda pair: pair[0])
    unpacks = sorted((moment, i) for i in inside(trace) if (moment := points.unpack(i)) is not None)
    found = {item.storage: "" for item in items}
    following = arrived = 0  # the next to fetch, the next to be needed
    ahead = 0
    for moment, tensor in unpacks:
        while arrived < len(needs) and needs[arrived][0] <= moment:
            if arrived < following:
                ahead -= needs[arrived][1].nbytes
            else:
                following = arrived + 1  # it is fetched here, on demand
            arrived += 1
        while following < len(needs) and (ahead + needs[following][1].nbytes <= window or (not ahead and window)):
            found[needs[following][1].storage] = f"unpack {points.names[tensor]}"
            ahead += needs[following][1].nbytes
            following += 1
    return found
