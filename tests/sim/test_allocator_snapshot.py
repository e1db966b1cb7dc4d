"""A simulated step as a memory snapshot, read with torch's own readers and replayed."""

from __future__ import annotations

import base64
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.test_simulator import any_plans
from tests.strategies import traces
from vdnn.analysis.moments import resolve
from vdnn.analysis.synthetic import conv_chain
from vdnn.errors import UsageError
from vdnn.policies import Options, decide
from vdnn.replay import replay_snapshot
from vdnn.sim import simulate_step
from vdnn.sim.allocator import AllocatorOptions
from vdnn.sim.allocator_snapshot import step_snapshot
from vdnn.sim.allocator_step import step_memory
from vdnn.snapshots import plain_unpickle, read_snapshot, save_snapshot
from vdnn.values import hardware, save

MIB = 2**20


@pytest.fixture(scope="module")
def snapshot() -> dict:
    """VDNN on a chain of convolutions, with the timeline's times."""
    trace, machine = conv_chain(batch=512), hardware("titan-x")
    plan = decide("vdnn-all", trace, machine, Options(min_bytes=1))
    assert plan.offloaded_bytes > 0
    line = simulate_step(trace, plan, machine, timeline=True).timeline
    return step_snapshot(trace, resolve(plan, trace), machine.memory_bytes, line)


def test_torchs_readers_take_it(snapshot):
    """Their sums are checked inside `segsum`; the plots are pages with the snapshot in them, as torch writes it."""
    viz = pytest.importorskip("torch.cuda._memory_viz")
    data = pickle.loads(pickle.dumps(snapshot, protocol=4))
    reserved = sum(segment["total_size"] for segment in data["segments"])
    summary = viz.segsum(data)
    assert f"total_reserved: {viz.Bytes(reserved)}" in summary
    assert f"segments: {len(data['segments'])}" in summary
    listing = viz.trace(data)
    actions = [entry["action"] for entry in data["device_traces"][0]]
    assert listing.startswith(f"Device 0 ----------------\n{len(actions)} entries")
    assert listing.count("cudaMalloc(") == actions.count("segment_alloc") > 3
    assert listing.count("\ndel ") == actions.count("free_requested") > 10
    for plot in (viz.trace_plot, viz.segment_plot, lambda d: viz.trace_plot(d, plot_segments=True)):
        page = plot(data)
        packed = json.loads(re.search(r"const local_files = (.*)\n", page)[1])[0]["base64"]
        assert pickle.loads(base64.b64decode(packed)) == data
    flames = viz.memory(data, format_flamegraph=lambda lines: lines)
    assert "parameter conv0.weight" in flames
    # a line for each block, and one for what of it nobody asked for
    blocks = [block for segment in data["segments"] for block in segment["blocks"]]
    lines = viz.segments(data, format_flamegraph=lambda lines: lines).splitlines()
    assert len(lines) == sum(1 + (block["size"] > block["requested_size"]) for block in blocks)


def test_what_the_viewer_needs(snapshot):
    """Plain values, addresses that JavaScript can count, times that do not go back, frees that end at once."""
    assert plain_unpickle(pickle.dumps(snapshot, protocol=4)) == snapshot
    entries = snapshot["device_traces"][0]
    assert max(entry["addr"] + entry["size"] for entry in entries) < 2**53
    times = [entry["time_us"] for entry in entries]
    assert times == sorted(times)
    assert times[-1] > times[0]
    for i, entry in enumerate(entries):
        if entry["action"] == "free_requested":
            assert (entries[i + 1]["action"], entries[i + 1]["addr"]) == ("free_completed", entry["addr"])
    names = {frame["name"] for entry in entries for frame in entry["frames"]}
    assert any(name.startswith("fetch of ") for name in names)
    assert any(re.search(r" in conv1#0 \(forward\)", name) for name in names)


@settings(max_examples=40)
@given(st.data(), traces(), st.booleans())
def test_a_simulated_snapshot_replays_without_a_difference(tmp_path_factory, data, trace, expandable):
    trace = replace(trace, device="cuda")
    moves = resolve(data.draw(any_plans(trace)), trace)
    options = AllocatorOptions(expandable_segments=expandable)
    path = tmp_path_factory.getbasetemp() / "simulated.pickle"
    save_snapshot(step_snapshot(trace, moves, 1 << 40, options=options), path)
    read = read_snapshot(path)
    if not any(read.events):
        return
    (device,) = replay_snapshot(read)
    assert device.difference is None
    memory = step_memory(trace, moves, 1 << 40, options)
    assert device.statistics == memory.allocator.statistics()


def test_a_step_that_does_not_fit_ends_with_its_oom(tmp_path):
    trace = conv_chain(batch=512)
    save_snapshot(step_snapshot(trace, (), 80 * MIB), tmp_path / "oom.pickle")
    last = read_snapshot(tmp_path / "oom.pickle").events[0][-1]
    assert last.action == "oom"
    assert last.addr < 80 * MIB
    assert replay_snapshot(read_snapshot(tmp_path / "oom.pickle"))[0].difference is None


def test_a_step_of_the_virtual_device_has_none():
    with pytest.raises(UsageError, match="capture it for cuda"):
        step_snapshot(replace(conv_chain(), device="cpu"), (), 1 << 40)


def test_the_command_writes_it(tmp_path: Path):
    save(conv_chain(batch=64), tmp_path / "t.json.gz")
    out = tmp_path / "m.pickle"
    code = "from vdnn.cli.main import command_line; command_line()"
    arguments = ["simulate", str(tmp_path / "t.json.gz"), "--gpu", "t4", "--policy", "vdnn-all"]
    command = [sys.executable, "-c", code, *arguments, "--memory-snapshot", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.endswith(f"Wrote {out}\n")
    assert replay_snapshot(read_snapshot(out))[0].difference is None
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "--force" in again.stderr
