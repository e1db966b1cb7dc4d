"""Example values of realistic size: a chain of layers, run without and with offload, with events that add up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from vdnn.values import (
    Entry,
    Keep,
    MemoryEvent,
    ModuleCall,
    Offload,
    Op,
    PeakItem,
    Plan,
    RunResult,
    SavedName,
    SavedTensor,
    Span,
    Stall,
    Storage,
    Timeline,
    Trace,
)

MIB = 2**20
US = 1000


@dataclass(frozen=True)
class Example:
    trace: Trace
    plan: Plan
    baseline: RunResult
    offloaded: RunResult


def layer_bytes(i: int, count: int) -> int:
    """Large feature maps first, small ones last, as in a CNN."""
    return max(6, 420 * (count - i) // count) * MIB // (2 if i % 3 == 1 else 1)


def make_trace(count: int) -> Trace:
    """`count` layers, each a forward and a backward op; every layer saves its output and its weight."""
    modules, storages, ops, saved = [], [], [], []
    n = 2 * count
    for i in range(count):
        kind = "conv" if i % 3 == 0 else "activation"
        modules.append(ModuleCall(f"features.{i}", 0, kind.title(), kind, -1, i, i + 1, n - 1 - i, n - i))
        storages.append(Storage(5 * MIB, "parameter", f"features.{i}.weight", -1, n, n - 1 - i, n, ""))
        held = "output" if i == count - 1 else ""
        storages.append(Storage(layer_bytes(i, count), "activation", "", i, i + 1, n - 1 - i, n - i, held))
    for i in range(n):
        layer = min(i, n - 1 - i)
        phase = "forward" if i < count else "backward"
        nbytes = storages[2 * layer + 1].nbytes
        ops.append(
            Op("aten.conv", phase, layer, "conv", "float32", (1,) * 7, (2 * layer,), (), 10**9, nbytes, nbytes, 0)
        )
    for i in range(count):
        for index, storage in enumerate((2 * i, 2 * i + 1)):
            nbytes = storages[storage].nbytes
            saved.append(
                SavedTensor(i, index, storage, "float32", (nbytes // 4,), (1,), 0, nbytes, i, (n - 1 - i,), "Conv")
            )
    return Trace(
        "paper:vgg-like", 64, "fp32", "sgd", "cuda", False, (), "2.14.1", (),
        tuple(modules), tuple(storages), tuple(ops), tuple(saved),
    )  # fmt: skip


def make_plan(trace: Trace) -> Plan:
    """Every second layer but the last goes to the host."""
    entries = []
    count = len(trace.modules)
    for i in range(count):
        storage = trace.storages[2 * i + 1]
        name = SavedName(f"features.{i}", 0, 1, "float32", 1, storage.nbytes)
        if i % 2 == 0 and i < count - 1:
            fetch = f"unpack features.{min(i + 2, count - 1)}#0/1"
            action: Keep | Offload = Offload(f"end features.{i}#0", fetch)
        else:
            action = Keep("output of the model" if storage.held else "no gain: needed at once")
        entries.append(Entry((name,), storage.nbytes, action))
    return Plan("vdnn-conv", trace.model, trace.batch, "cuda", trace.fingerprint(), 8 << 30, tuple(entries))


def make_timeline(trace: Trace, moved: frozenset[int]) -> Timeline:
    """A run of the chain; layers in `moved` are copied out (12 GB/s) and back, and backward waits for some."""
    count = len(trace.modules)
    spans: list[Span] = []
    stalls: list[Stall] = []
    memory: list[MemoryEvent] = []
    clock = out_end = 0
    for i in range(count):
        nbytes = trace.storages[2 * i + 1].nbytes
        name, length = f"features.{i}", nbytes // 90
        spans.append(Span("host", name, "forward", i * 30 * US, i * 30 * US + 8 * US, 0))
        memory.append(MemoryEvent(clock, i, nbytes, "activation", "device"))
        memory.append(MemoryEvent(clock, i, nbytes // 3, "temporary", "device"))
        spans.append(Span("compute", name, "forward", clock, clock + length, 0))
        clock += length
        memory.append(MemoryEvent(clock, i, -(nbytes // 3), "temporary", "device"))
        if i in moved:
            start = max(clock, out_end)
            out_end = start + nbytes // 12
            spans.append(Span("offload", f"{name}#0/1", "forward", start, out_end, nbytes))
            stalls.append(Stall("compute", "release", f"{name}#0/1", clock, out_end))
            memory.append(MemoryEvent(clock, i, nbytes, "pinned", "host"))
            clock = out_end
            memory.append(MemoryEvent(clock, i, -nbytes, "activation", "device"))
    back_end = clock
    for i in reversed(range(count)):
        position = 2 * count - 1 - i
        nbytes = trace.storages[2 * i + 1].nbytes
        name, length = f"features.{i}", nbytes // 45
        spans.append(Span("host", name, "backward", (position + 5) * 30 * US, (position + 5) * 30 * US + 9 * US, 0))
        if i in moved:
            start = max(back_end, clock - nbytes // 24)
            back_end = start + nbytes // 12
            spans.append(Span("prefetch", f"{name}#0/1", "backward", start, back_end, nbytes))
            memory.append(MemoryEvent(start, position, nbytes, "activation", "device"))
            if back_end > clock:
                stalls.append(Stall("compute", "prefetch", f"{name}#0/1", clock, back_end))
                clock = back_end
            memory.append(MemoryEvent(clock, position, -nbytes, "pinned", "host"))
        memory.append(MemoryEvent(clock, position, 5 * MIB, "gradient", "device"))
        spans.append(Span("compute", name, "backward", clock, clock + length, 0))
        clock += length
        memory.append(MemoryEvent(clock, position, -nbytes, "activation", "device"))
    spans.append(Span("compute", "sgd", "optimizer", clock, clock + 4000 * US, 0))
    resident = (("parameter", count * 5 * MIB), ("optimizer_state", count * 5 * MIB), ("input", 37 * MIB))
    spans.sort(key=lambda s: s.start_ns)
    memory.sort(key=lambda e: e.time_ns)
    return Timeline(tuple(spans), tuple(stalls), tuple(memory), resident)


def make_result(trace: Trace, plan: Plan | None) -> RunResult:
    """The numbers of a run, from its own timeline."""
    moved = frozenset(
        i for i, e in enumerate(plan.entries if plan is not None else ()) if isinstance(e.action, Offload)
    )
    timeline = make_timeline(trace, moved)
    held: dict[str, int] = dict(timeline.resident)
    peak, at_peak = sum(held.values()), dict(held)
    host = host_peak = 0
    for event in timeline.memory:
        if event.where == "host":
            host += event.nbytes
            host_peak = max(host, host_peak)
            continue
        held[event.category] = held.get(event.category, 0) + event.nbytes
        if sum(held.values()) > peak:
            peak, at_peak = sum(held.values()), dict(held)
    items = [PeakItem(c, "", b) for c, b in at_peak.items() if c != "activation" and b]
    share = at_peak["activation"] // 4
    items += [PeakItem("activation", f"features.{i}#0", share) for i in range(3)]
    items.append(PeakItem("activation", "features.3#0", at_peak["activation"] - 3 * share))
    compute = [s for s in timeline.spans if s.stream == "compute"]
    bytes_moved = sum(trace.storages[2 * i + 1].nbytes for i in moved)
    return RunResult(
        source="simulated",
        model=trace.model,
        batch=trace.batch,
        gpu="titan-x",
        policy=plan.policy if plan is not None else "none",
        precision="fp32",
        trace=trace.fingerprint(),
        plan=plan.fingerprint() if plan is not None else "",
        peak_requested_bytes=peak,
        iteration_time_ns=compute[-1].end_ns,
        forward_time_ns=max(s.end_ns for s in compute if s.phase == "forward"),
        stall_ns=sum(s.end_ns - s.start_ns for s in timeline.stalls),
        offloaded_bytes=bytes_moved,
        prefetched_bytes=bytes_moved,
        host_peak_bytes=host_peak,
        fits=plan is not None,
        peak_at="backward of features.3#0",
        peak_items=tuple(items),
        timeline=timeline,
    )


def make_example(count: int = 40) -> Example:
    """Trace, plan and both runs of a chain of `count` layers."""
    trace = make_trace(count)
    trace.check()
    plan = make_plan(trace)
    plan.check()
    baseline, offloaded = make_result(trace, None), make_result(trace, plan)
    baseline.check()
    offloaded.check()
    return Example(trace, plan, baseline, offloaded)


@pytest.fixture(scope="session")
def example() -> Example:
    return make_example()


def make_policies(example: Example, batches: tuple[int, ...] = (64, 128, 256)) -> tuple[RunResult, ...]:
    """Four policies at several batches; the peak and the time grow with the batch."""
    found = []
    for batch in batches:
        factor = batch / 64
        for policy, peak, time in (
            ("none", 1.0, 1.0),
            ("vdnn-conv", 0.55, 1.12),
            ("vdnn-all", 0.35, 1.4),
            ("vdnn-dyn", 0.5, 1.05),
        ):
            base = example.baseline
            assert base.peak_requested_bytes is not None
            assert base.iteration_time_ns is not None
            size, length = int(base.peak_requested_bytes * peak * factor), int(base.iteration_time_ns * time * factor)
            stall = length - int(base.iteration_time_ns * factor)
            found.append(
                replace(
                    base,
                    batch=batch,
                    policy=policy,
                    peak_requested_bytes=size,
                    iteration_time_ns=length,
                    stall_ns=stall,
                    offloaded_bytes=None if policy == "none" else size // 2,
                    fits=size <= 12 << 30,
                    timeline=None,
                )
            )
    return tuple(found)


@pytest.fixture(scope="session")
def policies(example: Example) -> tuple[RunResult, ...]:
    return make_policies(example)
