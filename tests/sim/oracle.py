"""What a simulated step must satisfy, worked out again from the raw trace and plan: slowly, and by other means.

Nothing here uses `vdnn.analysis` or `vdnn.sim`: points are looked up by their text, memory is summed storage by
storage for every op, order is read from the timeline.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vdnn.values import OUTSIDE, Hardware, Offload, Plan, RunResult, Span, Trace


@dataclass
class Trip:
    """One copy out and back, in positions."""

    name: str
    storage: int
    nbytes: int
    pack: int
    release: int
    fetch: int | None
    need: int | None
    wait: int | None


def tensor_names(trace: Trace) -> list[str]:
    names = []
    for t in trace.saved:
        owner = f"{trace.modules[t.module].fqn}#{trace.modules[t.module].call}" if t.module >= 0 else f"{OUTSIDE}#0"
        names.append(f"{owner}/{t.index}")
    return names


def position(trace: Trace, text: str) -> int:
    kind, what = text.split(" ", 1)
    if kind == "end":
        (call,) = [c for c in trace.modules if f"{c.fqn}#{c.call}" == what]
        return call.forward_end
    t = trace.saved[tensor_names(trace).index(what)]
    return t.packed_at if kind == "pack" else min(t.unpacked_at)


def trips(trace: Trace, plan: Plan) -> list[Trip]:
    names = tensor_names(trace)
    found = []
    for entry in plan.entries:
        if not isinstance(entry.action, Offload):
            continue
        tensors = [names.index(str(name)) for name in entry.saved]
        stretches: dict[object, list[int]] = {}
        for i in tensors:
            t = trace.saved[i]
            stretch = "whole" if entry.action.whole else (t.offset, t.shape, t.stride, t.dtype)
            stretches.setdefault(stretch, []).append(i)
        for group in stretches.values():
            needs = [u for i in group for u in trace.saved[i].unpacked_at]
            need = min(needs) if needs else None
            points = [position(trace, entry.action.prefetch_at)] if entry.action.prefetch_at else []
            points += [need] if need is not None else []
            found.append(
                Trip(
                    names[min(group)],
                    trace.saved[group[0]].storage,
                    # the strategies draw dense views only
                    entry.storage_bytes if entry.action.whole else trace.saved[group[0]].nbytes,
                    min(trace.saved[i].packed_at for i in group),
                    position(trace, entry.action.release_at),
                    min(points, default=None),
                    need,
                    position(trace, entry.action.wait_at) if entry.action.wait_at else None,
                )
            )
    return found


def requested_by_op(trace: Trace, plan: Plan | None) -> list[int]:
    """Bytes live during each op."""
    away = trips(trace, plan) if plan else []
    live = []
    for i, op in enumerate(trace.ops):
        total = op.workspace_bytes
        for number, s in enumerate(trace.storages):
            gone_at = [max(t.release, s.release) for t in away if t.storage == number]
            if s.alloc <= i < s.free and not (gone_at and i >= gone_at[0]):
                total += s.nbytes
        for t in away:
            if t.fetch is not None and t.fetch <= i < trace.storages[t.storage].free:
                total += t.nbytes
        live.append(total)
    return live


def host_by_position(trace: Trace, plan: Plan) -> list[int]:
    """Pinned bytes at each position."""
    away = trips(trace, plan)
    return [
        sum(t.nbytes for t in away if t.pack <= p < max(trace.storages[t.storage].free, t.pack + 1))
        for p in range(len(trace.ops) + 1)
    ]


def check_step(trace: Trace, plan: Plan, machine: Hardware, result: RunResult, op_ns: list[int]) -> None:
    """Assert everything that the timeline of a step must satisfy."""
    line = result.timeline
    assert line is not None
    by_stream: dict[str, list[Span]] = {"host": [], "compute": [], "offload": [], "prefetch": []}
    for span in line.spans:
        by_stream[span.stream].append(span)
    for spans in by_stream.values():
        for before, after in itertools.pairwise(spans):
            assert before.end_ns <= after.start_ns
    running = [i for i, ns in enumerate(op_ns) if ns]
    assert [s.end_ns - s.start_ns for s in by_stream["compute"]] == [op_ns[i] for i in running]
    starts = dict(zip(running, (s.start_ns for s in by_stream["compute"]), strict=True))
    ends = dict(zip(running, (s.end_ns for s in by_stream["compute"]), strict=True))

    out = {s.what: s for s in by_stream["offload"]}
    back = {s.what: s for s in by_stream["prefetch"]}
    away = trips(trace, plan)
    assert sorted(out) == sorted(t.name for t in away)
    assert sorted(back) == sorted(t.name for t in away if t.fetch is not None)
    for t in away:
        copy = out[t.name]
        assert all(copy.start_ns >= ends[i] for i in running if i < t.pack), "a copy starts after what it copies"
        assert all(starts[i] >= copy.end_ns for i in running if i >= t.release), "compute waits at the release"
        s = trace.storages[t.storage]
        gone = [e.time_ns for e in line.memory if e.where == "device" and e.nbytes == -s.nbytes]
        if s.nbytes:
            assert any(time >= copy.end_ns for time in gone), "memory goes after the copy out"
        if t.fetch is None:
            continue
        again = back[t.name]
        assert again.start_ns >= copy.end_ns, "nothing comes back before it is out"
        assert all(again.start_ns >= ends[i] for i in running if i < t.fetch), "its memory is made on compute"
        if t.nbytes and t.fetch < s.free:
            taken = [e for e in line.memory if e.where == "device" and e.nbytes == t.nbytes and e.position == t.fetch]
            assert any(e.time_ns <= again.start_ns for e in taken), "a copy back has memory to go to"
        if t.need is not None:
            assert all(starts[i] >= again.end_ns for i in running if i >= t.need), "first use after the copy back"
        if t.wait is not None and t.need is not None and t.fetch < t.wait < t.need:
            assert all(starts[i] >= again.end_ns for i in running if i >= t.wait), "compute waits where the plan says"

    _check_link(machine, by_stream["offload"], by_stream["prefetch"])
    _check_memory(trace, plan, result)
    waits = sum(s.end_ns - s.start_ns for s in line.stalls if s.cause != "launch")
    assert result.stall_ns == waits
    idle = sum(s.end_ns - s.start_ns for s in line.stalls)
    last = max((e for e in (*ends.values(), *(s.end_ns for s in line.stalls))), default=0)
    assert last == sum(op_ns) + idle, "every gap of compute has a cause"
    assert result.iteration_time_ns == max([last, *(s.end_ns for s in line.spans)])


def _check_link(machine: Hardware, out: list[Span], back: list[Span]) -> None:
    """Neither a way nor both together carry more than they can."""
    for spans, rate in ((out, machine.d2h_bytes_per_s), (back, machine.h2d_bytes_per_s)):
        for span in spans:
            carrying_ns = span.end_ns - span.start_ns - machine.link_latency_ns
            assert carrying_ns >= 0
            assert span.nbytes * 10**9 <= rate * carrying_ns
    edges = sorted({e for s in (*out, *back) for e in (s.start_ns + machine.link_latency_ns, s.end_ns)})
    capacity = 0
    for a, b in itertools.pairwise(edges):
        busy = [any(s.start_ns + machine.link_latency_ns <= a and b <= s.end_ns for s in way) for way in (out, back)]
        rate = machine.d2h_bytes_per_s * busy[0] + machine.h2d_bytes_per_s * busy[1]
        capacity += (b - a) * (min(rate, machine.duplex_bytes_per_s) if all(busy) else rate)
    assert sum(s.nbytes for s in (*out, *back)) * 10**9 <= capacity


def _check_memory(trace: Trace, plan: Plan, result: RunResult) -> None:
    """The timeline's memory events, replayed, give the oracle's bytes for each op."""
    line = result.timeline
    assert line is not None
    resident = sum(nbytes for _, nbytes in line.resident)
    expected = requested_by_op(trace, plan)
    replayed = [
        resident + sum(e.nbytes for e in line.memory if e.where == "device" and e.position <= i)
        for i in range(len(trace.ops))
    ]
    assert replayed == expected
    assert result.peak_requested_bytes == max(expected, default=0)
    assert sum(item.nbytes for item in result.peak_items) == result.peak_requested_bytes
    live = most = resident
    for event in line.memory:
        if event.where == "device":
            live += event.nbytes
            most = max(most, live)
    assert most == max([resident, *expected])
    assert result.host_peak_bytes == max(host_by_position(trace, plan), default=0)
    times = [e.time_ns for e in line.memory]
    assert times == sorted(times)
