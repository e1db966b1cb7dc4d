"""A step of a trace under a plan on a machine, as a `RunResult`.

    resolve the plan's points → moments        vdnn.analysis.liveness
    allocated, reserved, and whether it fits   vdnn.sim.allocator_step: the CUDA caching allocator as a model
    requested bytes from program order         vdnn.analysis.liveness: exact, no clock needed; of the allocator's run,
                                               in which a workspace may have found no room
    time from streams and the link             vdnn.sim.run

`fits` is what the allocator says with the GPU's memory less CUDA's context and cuDNN's kernels (or the limit given) as
its limit: cached segments are given back and the allocation is tried again, as on a device. What cuBLAS and cuDNN take
from the allocator is added here (vdnn.sim.workspaces), since it depends on the GPU.
Where the plan names convolution algorithms, their table gives the time and the workspace of each. Under the regime
"paper" the step is Torch7's (vdnn.analysis.torch7) and `fits` is the paper's criterion: requested bytes against the
memory; what one best-fit pool makes of the step (vdnn.sim.pool: cnmem's, which vDNN used) is a note.
A step of device "cpu" runs on a virtual device, which counts requested bytes and has no such allocator.
"""

from __future__ import annotations

from collections.abc import Sequence

from vdnn.analysis.convolutions import offers_of, with_workspaces
from vdnn.analysis.dataparallel import Bucket, data_parallel
from vdnn.analysis.encoding import planned
from vdnn.analysis.liveness import host_bytes, op_text, peak
from vdnn.analysis.moments import Move, resolve
from vdnn.analysis.torch7 import Regime, under
from vdnn.costs import fitted, times_with
from vdnn.errors import UsageError
from vdnn.sim.allocator_step import StepMemory, step_memory
from vdnn.sim.allreduce import Ring, ring_of, share_of
from vdnn.sim.pinned import pinned_bytes
from vdnn.sim.pool import run_pool
from vdnn.sim.recorder import Recorder
from vdnn.sim.run import Run, run
from vdnn.sim.workspaces import allocatable_bytes, with_libraries, without_workspaces
from vdnn.units import format_bytes, format_ns
from vdnn.values.hardware import Hardware
from vdnn.values.node import ALONE, Node
from vdnn.values.plan import Plan
from vdnn.values.result import RunResult
from vdnn.values.trace import Trace

__all__ = ["simulate_step"]


def simulate_step(
    trace: Trace,
    plan: Plan | None,
    hardware: Hardware,
    *,
    memory_limit: int | None = None,
    timeline: bool = False,
    regime: Regime = "pytorch",
    node: Node = ALONE,
) -> RunResult:
    """Predict one step; without a plan nothing is offloaded. `prefetched_bytes` counts every copy back.

    In a node of several GPUs it is the step of one of them, with its share of the link and DDP's all-reduces; it fits
    if it fits into the GPU and what all of them pin fits into the host.

    Raises:
        PlanMismatchError: the plan is not for this trace.
        UsageError: a memory limit that is not positive, or a node that cannot be.
    """
    node.check()
    if node.gpus > 1 and regime == "paper":
        raise UsageError("the paper's Torch7 has no DistributedDataParallel: leave --regime paper or --gpus out")
    if memory_limit is not None and memory_limit <= 0:
        raise UsageError(f"a memory limit of {memory_limit} bytes holds nothing: give more than 0")
    source = under(regime, trace, plan.policy if plan else "")
    step, buckets = data_parallel(planned(source, plan), node)
    hardware = share_of(hardware, node)
    moves = resolve(plan, step)
    chosen = offers_of(plan, step, hardware.peak("float32"))
    trace = with_workspaces(with_libraries(step, hardware) if regime == "pytorch" else step, chosen)
    recorder = Recorder(trace, moves) if timeline else None
    op_ns = times_with(trace, hardware, chosen, plan.algorithm_table if plan else "")
    paper = regime == "paper" or bool(plan and plan.algorithm_table)
    host_ns = [hardware.launch_ns] * len(op_ns) if paper else None
    ring = ring_of(hardware, node) if buckets else None
    times = run(trace, moves, op_ns, hardware, recorder, buckets, ring, host_ns)
    spread = None if paper or hardware.timings else fitted().spread(hardware.id)
    allocates = trace.device != "cpu" and regime == "pytorch"
    capacity = memory_limit or (allocatable_bytes(trace, hardware) if allocates else hardware.available_bytes)
    memory = step_memory(trace, moves, capacity) if allocates else None
    most = peak(without_workspaces(trace, memory.without) if memory else trace, moves)
    fits = memory.fits if memory else most.nbytes <= capacity
    notes = list(plan.notes if plan else ())
    copied_bytes = max(host_bytes(trace, moves), default=0)
    pinned = pinned_bytes(moves) if plan is not None and plan.copies is not None else copied_bytes
    if pinned > copied_bytes:
        notes.append(f"pins {format_bytes(pinned)} for {format_bytes(copied_bytes)}: torch rounds to powers of two")
    if node.gpus > 1:
        notes.append(_node_note(node, buckets, ring_of(hardware, node), times))
    everything = node.gpus * pinned
    if node.host_bytes is not None and everything > node.host_bytes:
        fits = False
        notes.append(
            f"does not fit into the host: {node.gpus} GPUs pin {format_bytes(pinned)} each, {format_bytes(everything)} "
            f"in all, and it has {format_bytes(node.host_bytes)}"
        )
    notes += _pool_notes(trace, moves, capacity) if regime == "paper" else _memory_notes(trace, memory, capacity)
    if times.launch_idle_ns > times.total_ns // 100:
        notes.append(f"compute waits {format_ns(times.launch_idle_ns)} for the host to issue ops; not counted as stall")
    return RunResult(
        source="simulated",
        model=trace.model,
        batch=trace.batch,
        gpu=hardware.id,
        policy=plan.policy if plan else "none",
        precision=trace.precision,
        trace=source.fingerprint(),
        plan=plan.fingerprint() if plan else "",
        peak_requested_bytes=most.nbytes,
        peak_allocated_bytes=memory.peak_allocated_bytes if memory else None,
        peak_reserved_bytes=memory.peak_reserved_bytes if memory else None,
        iteration_time_ns=times.total_ns,
        iteration_time_low_ns=int(times.total_ns * spread.low) if spread else None,
        iteration_time_high_ns=int(times.total_ns * spread.high) if spread else None,
        forward_time_ns=times.forward_ns,
        backward_time_ns=times.backward_ns,
        stall_ns=times.stall_ns,
        offloaded_bytes=sum(move.nbytes for move in moves),
        prefetched_bytes=sum(move.nbytes for move in moves if move.fetch is not None),
        host_peak_bytes=pinned,
        fits=fits,
        peak_at=op_text(trace, most.op),
        peak_items=most.items,
        notes=tuple(notes),
        timeline=recorder.timeline() if recorder else None,
    )


def _node_note(node: Node, buckets: Sequence[Bucket], ring: Ring, times: Run) -> str:
    way = "the link to the host" if ring.on_link else "NVLink"
    return (
        f"one of {node.gpus} GPUs, {node.gpus_per_link} on a link: sums {format_bytes(sum(b.nbytes for b in buckets))} "
        f"of gradients in {len(buckets)} buckets over {way}; compute waits {format_ns(times.communication_ns)} for it, "
        "not counted as stall"
    )


def _memory_notes(trace: Trace, memory: StepMemory | None, capacity: int) -> list[str]:
    limit = format_bytes(capacity)
    if memory is None:
        return [f"fits by requested bytes in {limit}: a step of device {trace.device} has no caching allocator"]
    if memory.failed_at is not None:
        n = len(trace.ops)
        where = "before the step" if memory.failed_at < 0 else f"at {op_text(trace, min(memory.failed_at, n - 1))}"
        return [f"out of memory with {limit}: {where}; the peaks are those of unbounded memory"]
    notes = []
    if memory.without:
        count = len(memory.without)
        notes.append(
            f"in {limit} {count} convolution{'s find' if count > 1 else ' finds'} no room for cuDNN's workspace: slower"
        )
    if memory.retries:
        often = "once, which is a pause" if memory.retries == 1 else f"{memory.retries} times, each a pause"
        notes.append(f"fits into {limit} because cached segments are given back {often}")
    return notes


def _pool_notes(trace: Trace, moves: Sequence[Move], capacity: int) -> list[str]:
    pool = run_pool(trace, moves, capacity)
    if pool.failed_at is None:
        return [f"a best-fit pool of {format_bytes(capacity)} holds it ({format_bytes(pool.peak_bytes)} at most)"]
    where = "before the step" if pool.failed_at < 0 else f"at {op_text(trace, min(pool.failed_at, len(trace.ops) - 1))}"
    return [f"a best-fit pool fails {where}: {pool.failure}"]
