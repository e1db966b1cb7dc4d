"""One step on the streams: the host issues, compute runs in order, copies run beside it.

    for each instruction in program order:
        op      the host needs its time to issue it; compute starts it when it is free and the host has issued it
        OUT     submit the copy out, to start after what compute has done so far
        RELEASE compute waits for the copy out
        FETCH   submit the copy back, to start after what compute has done so far and after its copy out
        WAIT    compute waits for the copy back
        bucket  submit its all-reduce, to start after what compute has done so far; at the end compute waits for it

A copy of lane "compute" is waited for where it is issued, both ways: that is what it costs among the kernels. One of
lane "side" comes after the copy before it, whichever way that went, and back it waits for compute to have come to a
position of its own instead of here: so it starts as soon as the host, which runs ahead, has issued it.

The host never waits for the device. What compute waits for copies is a stall; what it waits for the host is
launch-bound time, and what it waits for all-reduces communication, which are counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vdnn.analysis.dataparallel import Bucket
from vdnn.analysis.moments import Move
from vdnn.costs import host_times
from vdnn.sim.allreduce import Ring
from vdnn.sim.copies import BACK, OUT_WAY, REDUCE, CopyStreams
from vdnn.sim.program import ARRIVE, FETCH, OUT, RELEASE, actions
from vdnn.sim.recorder import Cause, Recorder
from vdnn.values.hardware import Hardware
from vdnn.values.trace import Trace

__all__ = ["Pace", "Run", "clock", "run"]

_MARK, _REDUCE, _ACTION, _SUMMED = range(4)  # what comes first at one position
_NEVER = -(1 << 62)


@dataclass(frozen=True, slots=True)
class Run:
    """Times of one step, in ns. `events` counts what was simulated: ops, actions, and entries of the copies' heap.

    `communication_ns` is what compute waits for all-reduces.
    """

    forward_ns: int
    backward_ns: int
    total_ns: int
    stall_ns: int
    launch_idle_ns: int
    events: int
    communication_ns: int = 0


class Pace:
    """A step's ops as sums: where nothing stands between them, a stretch of ops takes one addition, not one each.

    Compute ends the ops from a to b when it would if it never waited for the host, or when it would if it started the
    op that it waited for last as soon as that was issued: the later of `now + work` and the largest of the others.
    """

    __slots__ = ("issued", "lead", "work")

    def __init__(self, op_ns: Sequence[int], host_ns: Sequence[int]) -> None:
        self.work = list(accumulate(op_ns, initial=0))
        self.issued = list(accumulate(host_ns, initial=0))
        # of each op: when the host has issued it, less the work before it; a view starts no kernel that could wait
        issued = self.issued[1:]
        self.lead = [i - w if ns else _NEVER for i, w, ns in zip(issued, self.work, op_ns, strict=False)]

    def after(self, first: int, end: int, now: int, host: int) -> int:
        """When compute has done the ops from `first` to `end`, with `now` and `host` before the first."""
        late = host - self.issued[first] + max(self.lead[first:end])
        return self.work[end] + max(now - self.work[first], late)


def run(
    trace: Trace,
    moves: Sequence[Move],
    op_ns: Sequence[int],
    hardware: Hardware,
    recorder: Recorder | None = None,
    buckets: Sequence[Bucket] = (),
    ring: Ring | None = None,
    host_ns: Sequence[int] | None = None,
    pace: Pace | None = None,
) -> Run:
    """Simulate one step, with the buckets that a ring sums; a recorder hears of every span, stall and memory event.

    `op_ns` is each op's time on the device, `host_ns` what the host takes to issue it (by default `host_times`), and
    `pace` the sums of both, for who runs one step many times.
    """
    launch = hardware.launch_ns
    pace = pace or Pace(op_ns, host_times(trace, hardware) if host_ns is None else host_ns)
    issued, work = pace.issued, pace.work
    first = 2 * len(moves)  # copy 2·i takes move i out, 2·i + 1 brings it back; then come the all-reduces
    copies = CopyStreams(hardware, first + len(buckets), ring)
    program = actions(moves)
    marks = {trace.forward_end: 0, trace.backward_end: 0} | {move.behind: 0 for move in moves if move.behind >= 0}
    last = -1  # the copy before, where one stream carries both ways
    host = now = stalled = idle = here = summed = 0
    if recorder is not None:
        recorder.reach(0, 0)
    stops = [(action[0], _ACTION, i) for i, action in enumerate(program)]
    stops += [(p, _MARK, -1) for p in (*marks, len(op_ns))]
    stops += [(bucket.ready, _REDUCE, i) for i, bucket in enumerate(buckets)]
    stops += [(bucket.wait, _SUMMED, i) for i, bucket in enumerate(buckets)]
    stops.sort()
    for position, stop, number in stops:
        if recorder is not None:
            for op in range(here, position):
                begin, asked, host = now, host, host + issued[op + 1] - issued[op]
                now = max(now, host) if op_ns[op] else now
                idle += now - begin
                recorder.op(op, asked, host, begin, now, now + op_ns[op])
                now += op_ns[op]
        elif here < position:
            begin = now
            now = pace.after(here, position, now, host)
            idle += now - begin - (work[position] - work[here])
            host += issued[position] - issued[here]
        here = position
        if stop == _MARK:
            if position in marks:
                marks[position] = now
            continue
        if stop == _REDUCE:
            assert ring is not None
            host += launch
            copies.submit(first + number, REDUCE, ring.sent_bytes(buckets[number].nbytes), max(now, host))
            continue
        if stop == _SUMMED:
            end = copies.end_of(first + number)
            if end > now:
                if recorder is not None:
                    recorder.wait_sum(number, now, end)
                summed += end - now
                now = end
            continue
        _, _, _, _, index, kind = program[number]
        move = moves[index]
        copy = 2 * index
        if kind == OUT:
            host += launch
            if move.lane == "side":
                copies.submit(copy, OUT_WAY, move.nbytes, max(now, host), last)
                last = copy
            else:
                copies.submit(copy, OUT_WAY, move.nbytes, max(now, host))
        elif kind == FETCH:
            host += launch
            if move.lane == "side":
                copies.submit(copy + 1, BACK, move.nbytes, max(marks.get(move.behind, 0), host), last)
                last = copy + 1
            else:
                copies.submit(copy + 1, BACK, move.nbytes, max(now, host), copy)
        else:
            end = copies.end_of(copy if kind == RELEASE else copy + 1)
            if end > now:
                waiting = min(max(now, host), end)  # until the host asks for the wait, it is the host that is late
                idle += waiting - now
                stalled += end - waiting
                if recorder is not None:
                    recorder.wait(index, _cause(kind, move), now, waiting, end)
                now = end
        if recorder is not None:
            recorder.action(index, kind, position, now)
    total = max(now, host, copies.drain())
    if recorder is not None:
        recorder.copies(copies)
        recorder.sums(copies, first, buckets)
    forward, both = marks[trace.forward_end], marks[trace.backward_end]
    return Run(forward, both - forward, total, stalled, idle, len(op_ns) + len(program) + copies.events, summed)


def clock(trace: Trace, op_ns: Sequence[int], hardware: Hardware) -> list[int]:
    """When compute reaches each position of a step without a plan; the last is when the step is over."""
    host = now = 0
    reached = [0]
    for duration, issued in zip(op_ns, host_times(trace, hardware), strict=True):
        host += issued
        if duration:
            now = max(now, host) + duration
        reached.append(now)
    reached[-1] = max(now, host)
    return reached


def _cause(kind: int, move: Move) -> Cause:
    if kind == RELEASE:
        return "release"
    if kind == ARRIVE:
        return "layer"
    return "fetch" if move.on_demand else "prefetch"
