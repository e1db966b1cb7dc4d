"""A Chrome trace says what the timeline says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import vdnn
from vdnn.errors import UsageError
from vdnn.reporting import write_perfetto
from vdnn.synthetic import conv_chain

TRACE = conv_chain()


def test_spans_stalls_and_memory_are_all_there(tmp_path: Path) -> None:
    plan = vdnn.plan(TRACE, "rtx4090", "vdnn-all", min_bytes=1)
    result = vdnn.simulate(TRACE, plan, "rtx4090", timeline=True)
    timeline = result.timeline
    assert timeline is not None
    events = json.loads(write_perfetto(result, tmp_path / "out.json").read_text())["traceEvents"]
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(names) == {"host", "compute", "offload", "prefetch", "stalls"}
    spans = [e for e in events if e["ph"] == "X"]
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


def test_a_result_without_timeline_and_another_ending_are_refused(tmp_path: Path) -> None:
    result = vdnn.simulate(TRACE)
    with pytest.raises(UsageError, match="has no timeline"):
        write_perfetto(result, tmp_path / "out.json")
    with pytest.raises(UsageError, match=r"must end in \.json"):
        write_perfetto(result, tmp_path / "out.pftrace")
