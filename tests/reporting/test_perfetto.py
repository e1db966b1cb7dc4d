"""A Chrome trace says what the timeline says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import vdnn
from vdnn.analysis.synthetic import conv_chain
from vdnn.errors import UsageError
from vdnn.reporting import write_perfetto

TRACE = conv_chain()


def test_spans_stalls_and_memory_are_all_there(tmp_path: Path) -> None:
    plan = vdnn.plan(TRACE, "rtx4090", "vdnn-all", min_bytes=1)
    result = vdnn.simulate(TRACE, plan, "rtx4090", timeline=True)
    timeline = result.timeline
    assert timeline is not None
    events = json.loads(write_perfetto(result, tmp_path / "out.json").read_text())["traceEvents"]
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(names) == {"host", "compute", "offload", "prefetch", "stalls"}
    added = ("cuda_runtime", "user_annotation")
    spans = [e for e in events if e["ph"] == "X" and e["cat"] not in added]
    assert len(spans) == len(timeline.spans) + len(timeline.stalls)
    for stream in ("compute", "offload", "prefetch"):
        ours = sum(s.end_ns - s.start_ns for s in timeline.spans if s.stream == stream)
        assert round(sum(e["dur"] for e in spans if e["tid"] == names[stream]) * 1000) == ours
        track = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == names[stream])
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(track))
    assert any(e["args"].get("bytes", 0) > 0 for e in spans if e["tid"] == names["offload"])
    device = [sum(e["args"].values()) for e in events if e["ph"] == "C" and e["name"] == "device memory"]
    assert max(device) >= (result.peak_requested_bytes or 0)
    assert min(device) >= 0
    times = [e["ts"] for e in events if e["ph"] != "M"]
    assert times == sorted(times)


def test_what_runs_on_the_device_has_the_call_that_issued_it(tmp_path: Path) -> None:
    result = vdnn.simulate(TRACE, vdnn.plan(TRACE, "rtx4090", "vdnn-all", min_bytes=1), "rtx4090", timeline=True)
    events = json.loads(write_perfetto(result, tmp_path / "out.json").read_text())["traceEvents"]
    calls = {e["args"]["correlation"]: e for e in events if e.get("cat") == "cuda_runtime"}
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
    assert len(work) == len(calls) == len({e["args"]["correlation"] for e in work}) > 0
    for event in work:
        call = calls[event["args"]["correlation"]]
        assert call["name"] == ("cudaLaunchKernel" if event["cat"] == "kernel" else "cudaMemcpyAsync")
        assert call["ts"] <= event["ts"] + 1e-6


def test_holistic_trace_analysis_reads_it(tmp_path: Path) -> None:
    analysis = pytest.importorskip("hta.trace_analysis", reason="pip install HolisticTraceAnalysis")
    trace = conv_chain((16,) * 60, batch=512, pool_every=0)  # HTA fails on less than 128 spans, and counts whole µs
    result = vdnn.simulate(trace, vdnn.plan(trace, "rtx4090", "vdnn-all", min_bytes=1), "rtx4090", timeline=True)
    path = write_perfetto(result, tmp_path / "out.json")
    data = {**json.loads(path.read_text()), "distributedInfo": {"rank": 0}}
    path.write_text(json.dumps(data))
    read = analysis.TraceAnalysis(trace_files={0: str(path)}, trace_dir=str(tmp_path))
    kinds, _ = read.get_gpu_kernel_breakdown(visualize=False)
    assert set(kinds.kernel_type) >= {"COMPUTATION", "MEMORY"}
    assert result.timeline is not None
    busy = sum(s.end_ns - s.start_ns for s in result.timeline.spans if s.stream == "compute") / 1000
    share = read.get_temporal_breakdown(visualize=False).iloc[0]
    assert float(share["compute_time(us)"]) == pytest.approx(busy, rel=0.05)


def test_a_result_without_timeline_and_another_ending_are_refused(tmp_path: Path) -> None:
    result = vdnn.simulate(TRACE)
    with pytest.raises(UsageError, match="has no timeline"):
        write_perfetto(result, tmp_path / "out.json")
    with pytest.raises(UsageError, match=r"must end in \.json"):
        write_perfetto(result, tmp_path / "out.pftrace")
