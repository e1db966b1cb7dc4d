"""A timeline as a Chrome trace: opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.

One track a stream, one for stalls, counters for device and host memory by category. Times are microseconds, as
the format has them, with the nanoseconds behind the point.

HolisticTraceAnalysis reads it as it reads PyTorch's profiler: what runs on the device is a `kernel` or a `gpu_memcpy`
on a stream, with the number of the `cudaLaunchKernel` or `cudaMemcpyAsync` that issued it, in a `ProfilerStep`.

Source: "Trace Event Format", the JSON object form; torch's profiler for the names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdnn.errors import UsageError
from vdnn.values import STREAMS, RunResult, Span

__all__ = ["trace_events", "write_perfetto"]

_PROCESS = 1
_STALLS = len(STREAMS) + 1
_COPIES = {"offload": "Memcpy DtoH", "prefetch": "Memcpy HtoD"}  # as the profiler names them


def trace_events(result: RunResult) -> list[dict[str, Any]]:
    """The events of a run, in order of time.

    Raises:
        UsageError: the result has no timeline.
    """
    timeline = result.timeline
    if timeline is None:
        raise UsageError(f"the result of {result.model} ({result.policy}) has no timeline: simulate it with one")
    tracks = {stream: number for number, stream in enumerate(timeline.streams, 1)}
    title = f"{result.model} batch {result.batch}, {result.gpu}, {result.policy}, {result.source}"
    found: list[dict[str, Any]] = [_name("process_name", 0, title)]
    found += [_name("thread_name", number, stream) for stream, number in tracks.items()]
    found.append(_name("thread_name", _STALLS, "stalls"))
    timed: list[dict[str, Any]] = []
    if timeline.spans:
        end = max(span.end_ns for span in timeline.spans)
        timed.append(_span(tracks["host"], "ProfilerStep#0", "user_annotation", 0, end))
    calls = _calls(timeline.spans)
    for number, span in enumerate(timeline.spans):
        device = span.stream != "host"
        kind = ("kernel" if span.stream == "compute" else "gpu_memcpy") if device else "cpu_op"
        name = f"{_COPIES[span.stream]} {span.what}" if span.stream in _COPIES else span.what
        event = _span(tracks[span.stream], name, kind, span.start_ns, span.end_ns)
        event["args"] = {"bytes": span.nbytes, "phase": span.phase}
        if device:
            event["args"] |= {"device": 0, "stream": tracks[span.stream], "correlation": number}
            at = calls.get(number, (span.start_ns, span.start_ns))
            call = "cudaLaunchKernel" if span.stream == "compute" else "cudaMemcpyAsync"
            timed.append(_span(tracks["host"], call, "cuda_runtime", *at) | {"args": {"correlation": number}})
        timed.append(event)
    for stall in timeline.stalls:
        what = f"{stall.cause}: {stall.what}" if stall.what else stall.cause
        timed.append(_span(_STALLS, what, f"{stall.stream} waits", stall.start_ns, stall.end_ns))
    levels: dict[str, dict[str, int]] = {"device": dict(timeline.resident), "host": {}}
    timed += [_counter(where, 0, level) for where, level in levels.items() if level]
    for event_of in timeline.memory:
        level = levels[event_of.where]
        level[event_of.category] = level.get(event_of.category, 0) + event_of.nbytes
        timed.append(_counter(event_of.where, event_of.time_ns, level))
    timed.sort(key=lambda event: event["ts"])
    return found + timed


def _calls(spans: Sequence[Span]) -> dict[int, tuple[int, int]]:
    """Where the host issued each span of the compute stream: both are in program order, and a view has no kernel."""
    found = {}
    host = iter([span for span in spans if span.stream == "host"])
    for number, span in enumerate(spans):
        if span.stream == "compute":
            issued = next((h for h in host if (h.what, h.phase) == (span.what, span.phase)), None)
            if issued is not None:
                found[number] = issued.start_ns, issued.end_ns
    return found


def write_perfetto(result: RunResult, path: str | Path) -> Path:
    """Write the trace; `path` ends in .json.

    Raises:
        UsageError: another ending, or a result without a timeline.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise UsageError(f"cannot write a Chrome trace to {path.name!r}: the name must end in .json")
    data = {"traceEvents": trace_events(result), "displayTimeUnit": "ns"}
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    return path


def _name(kind: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": track, "name": kind, "args": {"name": name}}


def _span(track: int, name: str, category: str, start_ns: int, end_ns: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": _PROCESS,
        "tid": track,
        "name": name,
        "cat": category,
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
    }


def _counter(where: str, time_ns: int, level: dict[str, int]) -> dict[str, Any]:
    return {
        "ph": "C",
        "pid": _PROCESS,
        "name": f"{where} memory",
        "ts": time_ns / 1000,
        "args": dict(level),
    }
