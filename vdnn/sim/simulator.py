"""A step of a trace under a plan on a machine, as a `RunResult`.

    resolve the plan's points → moments        vdnn.liveness
    memory from program order                  vdnn.liveness: exact, no clock needed
    time from streams and the link             vdnn.sim.run

Requested memory is exact for the trace. What the CUDA caching allocator makes of it (allocated, reserved) is
not modelled yet and therefore absent, so `fits` says only whether the *requested* peak is within the memory:
a step that does not fit by it cannot run, a step that does may still fail on rounding and fragmentation.
"""

from __future__ import annotations

from vdnn.costs import op_times
from vdnn.errors import UsageError
from vdnn.liveness import host_bytes, op_text, peak
from vdnn.moments import resolve
from vdnn.sim.recorder import Recorder
from vdnn.sim.run import run
from vdnn.units import format_bytes, format_ns
from vdnn.values.hardware import Hardware
from vdnn.values.plan import Plan
from vdnn.values.result import RunResult
from vdnn.values.trace import Trace

__all__ = ["simulate_step"]

_ON_TOP = "allocator rounding and fragmentation come on top"


def simulate_step(
    trace: Trace, plan: Plan | None, hardware: Hardware, *, memory_limit: int | None = None, timeline: bool = False
) -> RunResult:
    """Predict one step; without a plan nothing is offloaded. `prefetched_bytes` counts every copy back.

    Raises:
        PlanMismatchError: the plan is not for this trace.
        UsageError: a memory limit that is not positive.
    """
    if memory_limit is not None and memory_limit <= 0:
        raise UsageError(f"a memory limit of {memory_limit} bytes holds nothing: give more than 0")
    moves = resolve(plan, trace)
    recorder = Recorder(trace, moves) if timeline else None
    times = run(trace, moves, op_times(trace, hardware), hardware, recorder)
    most = peak(trace, moves)
    capacity = hardware.memory_bytes if memory_limit is None else memory_limit
    fits = most.nbytes <= capacity
    notes = [*(plan.notes if plan else ()), f"fits: requested bytes in {format_bytes(capacity)}; {_ON_TOP}"]
    if times.launch_idle_ns > times.total_ns // 100:
        notes.append(f"compute waits {format_ns(times.launch_idle_ns)} for the host to issue ops; not counted as stall")
    return RunResult(
        source="simulated",
        model=trace.model,
        batch=trace.batch,
        gpu=hardware.id,
        policy=plan.policy if plan else "none",
        precision=trace.precision,
        trace=trace.fingerprint(),
        plan=plan.fingerprint() if plan else "",
        peak_requested_bytes=most.nbytes,
        iteration_time_ns=times.total_ns,
        forward_time_ns=times.forward_ns,
        backward_time_ns=times.backward_ns,
        stall_ns=times.stall_ns,
        offloaded_bytes=sum(move.nbytes for move in moves),
        prefetched_bytes=sum(move.nbytes for move in moves if move.fetch is not None),
        host_peak_bytes=max(host_bytes(trace, moves), default=0),
        fits=fits,
        peak_at=op_text(trace, most.op),
        peak_items=most.items,
        notes=tuple(notes),
        timeline=recorder.timeline() if recorder else None,
    )
