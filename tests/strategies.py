"""Hypothesis strategies for the five values. Everything they draw passes `check()`.

@given(traces())                 a step of a chain of layers, with skips, in-place layers, nested and repeated modules
@given(st.data())                plan = data.draw(plans_for(trace)): a plan whose names and points are the trace's
@given(plans()) hardwares() timelines() results()
"""

from __future__ import annotations

from hypothesis import strategies as st

from tests.steps import traces, words
from vdnn.values import (
    OUTSIDE,
    STREAMS,
    Efficiency,
    Entry,
    Hardware,
    Keep,
    MemoryEvent,
    Offload,
    Peak,
    PeakItem,
    Plan,
    Provenance,
    RunResult,
    SavedName,
    SavedTensor,
    Source,
    Span,
    Stall,
    Timeline,
    Trace,
)

__all__ = ["hardwares", "plans", "plans_for", "results", "timelines", "traces"]

sizes = st.integers(0, 1 << 40)


# -- plans ---------------------------------------------------------------------------------------


def _name(trace: Trace, saved: SavedTensor) -> SavedName:
    call = trace.modules[saved.module] if saved.module >= 0 else None
    fqn, number = (call.fqn, call.call) if call is not None else (OUTSIDE, 0)
    return SavedName(fqn, number, saved.index, saved.dtype, len(saved.shape), saved.nbytes)


@st.composite
def plans_for(draw: st.DrawFn, trace: Trace) -> Plan:
    """A plan for this trace: storages that nobody holds are kept or offloaded, at points of the trace."""
    by_storage: dict[int, list[SavedTensor]] = {}
    for saved in trace.saved:
        by_storage.setdefault(saved.storage, []).append(saved)
    entries = []
    for storage, group in by_storage.items():
        names = tuple(_name(trace, saved) for saved in group)
        action: Keep | Offload = Keep("held" if trace.storages[storage].held else "")
        if not trace.storages[storage].held and draw(st.booleans()):
            last = names[-1]
            release = [f"pack {last}"] + ([f"end {last.module}#{last.call}"] if last.module != OUTSIDE else [])
            # backward asks for later packs first, so those are the points before this one's own unpack
            later = [s for s in trace.saved if s.packed_at >= group[-1].packed_at]
            points = ["", *(f"unpack {_name(trace, s)}" for s in later)]
            action = Offload(draw(st.sampled_from(release)), draw(st.sampled_from(points)), whole=draw(st.booleans()))
        entries.append(Entry(names, trace.storages[storage].nbytes, action))
    plan = Plan(
        policy="drawn",
        model=trace.model,
        batch=trace.batch,
        device=trace.device,
        trace=trace.fingerprint(),
        budget_bytes=draw(st.none() | st.integers(1, 1 << 40)),
        entries=tuple(entries),
        default=draw(st.sampled_from(["keep", "offload"])),
        min_bytes=draw(sizes),
        max_inflight_bytes=draw(sizes),
        notes=tuple(draw(st.lists(words, max_size=2))),
    )
    plan.check()
    return plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan for some trace."""
    return draw(plans_for(draw(traces())))


# -- hardware, timelines, results ----------------------------------------------------------------


@st.composite
def hardwares(draw: st.DrawFn) -> Hardware:
    """A machine with random, possible numbers."""
    rate = st.integers(10**6, 10**13)
    permille = st.integers(1, 1000)
    dtypes = draw(st.lists(st.sampled_from(["float16", "bfloat16", "tf32"]), unique=True))
    kernels = draw(st.lists(st.sampled_from(["conv", "matmul", "elementwise"]), unique=True))
    d2h, h2d = draw(rate), draw(rate)
    machine = Hardware(
        id=draw(words),
        name=draw(words),
        memory_bytes=draw(st.integers(1, 1 << 40)),
        peaks=tuple(Peak(d, draw(st.integers(10**9, 10**16))) for d in ["float32", *dtypes]),
        dram_bytes_per_s=draw(rate),
        d2h_bytes_per_s=d2h,
        h2d_bytes_per_s=h2d,
        duplex_bytes_per_s=draw(st.integers(max(d2h, h2d), d2h + h2d)),
        link_latency_ns=draw(st.integers(0, 10**6)),
        launch_ns=draw(st.integers(0, 10**6)),
        kernel_ns=draw(st.integers(0, 10**6)),
        efficiencies=tuple(Efficiency(k, draw(permille), draw(permille)) for k in kernels),
        sources=tuple(Source(f, draw(words)) for f in draw(st.lists(words, max_size=3, unique=True))),
    )
    machine.check()
    return machine


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """A timeline: per stream, spans that do not overlap."""
    length = st.integers(0, 10**6)
    clock = dict.fromkeys(STREAMS, 0)
    spans, stalls = [], []
    for stream in draw(st.lists(st.sampled_from(STREAMS), max_size=8)):
        start = clock[stream] + draw(length)
        clock[stream] = start + draw(length)
        if draw(st.booleans()):
            spans.append(Span(stream, draw(words), "forward", start, clock[stream], draw(sizes)))
        else:
            cause = draw(st.sampled_from(["release", "prefetch", "fetch", "layer", "launch"]))
            stalls.append(Stall(stream, cause, draw(words), start, clock[stream]))
    times = sorted(draw(st.lists(length, max_size=4)))
    memory = [
        MemoryEvent(
            t, i, draw(st.integers(-(1 << 30), 1 << 30)), "activation", draw(st.sampled_from(["device", "host"]))
        )
        for i, t in enumerate(times)
    ]
    resident = tuple(draw(st.lists(st.tuples(words, sizes), max_size=3)))
    timeline = Timeline(tuple(spans), tuple(stalls), tuple(memory), resident)
    timeline.check()
    return timeline


@st.composite
def results(draw: st.DrawFn) -> RunResult:
    """The result of a run, with any of its numbers unknown."""
    number = st.none() | sizes
    result = RunResult(
        source=draw(st.sampled_from(["simulated", "measured"])),
        model=draw(words),
        batch=draw(st.integers(1, 1024)),
        gpu=draw(words),
        policy=draw(words),
        precision="fp32",
        trace=draw(words),
        plan=draw(words),
        peak_requested_bytes=draw(number),
        peak_allocated_bytes=draw(number),
        peak_reserved_bytes=draw(number),
        iteration_time_ns=draw(number),
        forward_time_ns=draw(number),
        backward_time_ns=draw(number),
        stall_ns=draw(number),
        offloaded_bytes=draw(number),
        prefetched_bytes=draw(number),
        host_peak_bytes=draw(number),
        fits=draw(st.none() | st.booleans()),
        peak_at=draw(words),
        peak_items=tuple(PeakItem("activation", draw(words), draw(sizes)) for _ in range(draw(st.integers(0, 2)))),
        notes=tuple(draw(st.lists(words, max_size=2))),
        timeline=draw(st.none() | timelines()),
        provenance=Provenance(command=draw(words), seed=draw(st.none() | st.integers(0, 99))),
    )
    result.check()
    return result
