"""`vdnn replay`: recorded histories through the model, and files that are no snapshots.

There is no GPU here and none of these snapshots was recorded on one. They are written by the functions below, in
the structure that the docstring of `torch.cuda.memory._snapshot` describes, from histories of the slow oracle in
tests/sim/allocator_oracle.py (not of the model that is tested) or by hand.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.sim.allocator_oracle import Oracle, OutOfMemory
from tests.sim.test_allocator import CALLS, option_values
from vdnn.errors import FormatError
from vdnn.replay import replay_snapshot
from vdnn.sim.allocator import AddressSpace, AllocatorOptions
from vdnn.snapshots import plain_unpickle, read_snapshot, save_snapshot

MIB = 2**20
TORCH_STATES = {"allocated": "active_allocated", "awaiting": "active_awaiting_free", "free": "inactive"}


# -- a writer ---------------------------------------------------------------------------------------


def settings_of(options: AllocatorOptions) -> dict:
    """`allocator_settings` as torch fills it: no limit is −1; divisions by MiB."""
    large, rounding = options.large_segment_bytes // MIB, options.max_non_split_rounding_bytes // MIB
    return {
        "PYTORCH_CUDA_ALLOC_CONF": f"large_segment_size_mb:{large},max_non_split_rounding_mb:{rounding}",
        "max_split_size": -1 if options.max_split_bytes is None else options.max_split_bytes,
        "garbage_collection_threshold": options.garbage_collection_threshold,
        "expandable_segments": options.expandable_segments,
        "roundup_power2_divisions": {str(2**i): d for i, d in enumerate(options.roundup_divisions)},
    }


def snapshot_of(oracle: Oracle, first: int = 0) -> dict:
    """What torch would record of the oracle's history from event `first` on."""
    entries = []
    for i, (action, addr, size, stream) in enumerate(oracle.history[first:]):
        entry = {"action": action, "size": size, "stream": stream, "time_us": i, "frames": [], "pool_id": (0, 0)}
        entry["device_free" if action == "oom" else "addr"] = addr
        entries.append(entry)
    kinds = {p.addr: s for s in oracle.segments for p in s.pieces}
    segments = []
    for pieces in oracle.layout():
        segment = kinds[pieces[0][0]]
        blocks = [
            {"address": a, "size": n, "requested_size": r, "state": TORCH_STATES[state], "frames": []}
            for a, n, state, r in pieces
        ]
        active = [b for b in blocks if b["state"] != "inactive"]
        segments.append(
            {
                "device": 0,
                "address": pieces[0][0],
                "total_size": sum(b["size"] for b in blocks),
                "allocated_size": sum(b["size"] for b in active if b["state"] == "active_allocated"),
                "active_size": sum(b["size"] for b in active),
                "requested_size": sum(b["requested_size"] for b in active),
                "stream": segment.stream,
                "segment_type": "small" if segment.small else "large",
                "segment_pool_id": (0, 0),
                "is_expandable": bool(segment.page),
                "frames": [],
                "blocks": blocks,
            }
        )
    return {"segments": segments, "device_traces": [entries], "allocator_settings": settings_of(oracle.options)}


def recorded(calls, options=None, capacity=None, allowed=None) -> tuple[Oracle, list[int]]:
    """An oracle that took the calls, and how long its history was after each."""
    oracle = Oracle(AddressSpace(capacity), options or AllocatorOptions(), allowed)
    alive: list[int] = []
    lengths = [0]
    for call, number, stream in calls:
        if call == "malloc":
            with contextlib.suppress(OutOfMemory):
                alive.append(oracle.malloc(number, stream))
        elif call == "free" and alive:
            oracle.free(alive.pop(number % len(alive)))
        elif call == "use" and alive:
            oracle.record_stream(alive[number % len(alive)], stream)
        elif call == "finish":
            oracle.finish(stream)
        elif call == "empty":
            oracle.empty_cache()
        lengths.append(len(oracle.history))
    return oracle, lengths


def read(raw: object, folder: Path):
    path = folder / "snapshot.pickle"
    path.write_bytes(pickle.dumps(raw, protocol=4))
    return read_snapshot(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replay")


# -- histories --------------------------------------------------------------------------------------

LIMITS = st.sampled_from([None, None, 50 * MIB, 84 * MIB])


@settings(max_examples=150)
@given(st.lists(CALLS, min_size=1, max_size=60), option_values(), LIMITS, st.sampled_from([None, 90 * MIB]))
def test_a_whole_history_is_reproduced_with_every_statistic(folder, calls, options, capacity, allowed):
    oracle, _ = recorded(calls, options, capacity, allowed)
    assume(oracle.history)
    raw = snapshot_of(oracle)
    raw["memory_stats"] = dict(oracle.numbers)
    (device,) = replay_snapshot(read(raw, folder))
    assert device.difference is None
    assert device.reproduced == len(oracle.history)
    assert device.checked_statistics == len(oracle.numbers)
    assert (device.segments, device.start_blocks) == (len(raw["segments"]), 0)


@settings(max_examples=150)
@given(st.lists(CALLS, min_size=2, max_size=60), option_values(), LIMITS, st.data())
def test_a_history_that_begins_late_is_reproduced_too(folder, calls, options, capacity, data):
    """As after `_record_memory_history` in the middle of a program, or when torch's buffer of events was full."""
    oracle, lengths = recorded(calls, options, capacity)
    first = lengths[data.draw(st.integers(0, len(lengths) - 1))]
    assume(first < len(oracle.history))
    (device,) = replay_snapshot(read(snapshot_of(oracle, first), folder))
    if not any("was taken from what was asked for" in note for note in device.notes):
        assert device.difference is None


@settings(max_examples=100)
@given(st.lists(CALLS, min_size=5, max_size=40), st.data())
def test_a_changed_address_size_or_event_is_the_first_difference(folder, calls, data):
    """One recorded number is wrong: the replay stops there, or at the event that it contradicts, and not before it."""
    oracle, _ = recorded(calls)
    raw = snapshot_of(oracle)
    events = raw["device_traces"][0]
    allocs = [i for i, e in enumerate(events) if e["action"] == "alloc"]
    assume(allocs)
    i = data.draw(st.sampled_from(allocs))
    events[i]["addr"] += 512
    with contextlib.suppress(FormatError):  # what the block's end and the segments at the end contradict
        (device,) = replay_snapshot(read(raw, folder))
        assert device.difference is not None
        assert device.difference.event == i


def test_a_segment_of_another_size_is_named_with_both_values(folder):
    """A segment of 22 MiB for 5 MiB: the model asks for 20."""
    oracle, _ = recorded([("malloc", 5 * MIB, 0)])
    raw = snapshot_of(oracle)
    raw["device_traces"][0][0]["size"] = 22 * MIB
    segment = raw["segments"][0]
    segment["total_size"] += 2 * MIB
    segment["blocks"][-1]["size"] += 2 * MIB
    (device,) = replay_snapshot(read(raw, folder))
    assert device.difference is not None
    assert device.difference.event == 0
    assert "segment_alloc of 23068672 bytes" in device.difference.recorded
    assert "20971520 bytes" in device.difference.modelled


def test_a_wrong_state_at_the_end_is_named(folder):
    oracle, _ = recorded([("malloc", 3 * MIB, 0), ("malloc", 100, 0)])
    raw = snapshot_of(oracle)
    block = next(b for s in raw["segments"] for b in s["blocks"] if b["requested_size"] == 100)
    block["requested_size"] = 101
    (device,) = replay_snapshot(read(raw, folder))
    assert device.difference is not None
    assert device.difference.event == -1
    assert "100" in device.difference.modelled
    assert "101" in device.difference.recorded


def test_a_snapshot_event_checks_the_active_bytes(folder):
    oracle, _ = recorded([("malloc", 3 * MIB, 0)])
    raw = snapshot_of(oracle)
    seen = {"action": "snapshot", "addr": 0, "size": 3 * MIB, "stream": 0, "frames": []}
    raw["device_traces"][0].append(seen)
    assert replay_snapshot(read(raw, folder))[0].difference is None
    seen["size"] += 512
    difference = replay_snapshot(read(raw, folder))[0].difference
    assert difference is not None
    assert difference.what == "active bytes at a snapshot"


def test_private_pools_are_told_apart_and_given_back_as_recorded(folder):
    """A CUDA graph's pool takes its own segment though the default pool has a block; both are in the record by hand."""

    def event(action, addr, size, pool):
        return {"action": action, "addr": addr, "size": size, "stream": 0, "frames": [], "pool_id": pool}

    own, default, first, second = (0, 1), (0, 0), 0x7F0000000000, 0x7F0000200000
    events = [
        *(event("segment_alloc", first, 2 * MIB, default), event("alloc", first, 512, default)),
        *(event("segment_alloc", second, 2 * MIB, own), event("alloc", second, 512, own)),
        *(event("free_requested", second, 512, own), event("free_completed", second, 512, own)),
        event("segment_free", second, 2 * MIB, own),
    ]
    oracle, _ = recorded([("malloc", 512, 0)])
    raw = snapshot_of(oracle) | {"device_traces": [events]}
    (device,) = replay_snapshot(read(raw, folder))
    assert device.difference is None
    assert any("private pools" in note for note in device.notes)


# -- files that are none -----------------------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_code_runs_nothing(tmp_path, protocol):
    path, marker = tmp_path / "evil.pickle", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[Evil(marker)]]}, protocol=protocol))
    with pytest.raises(FormatError, match="nothing of it was run"):
        read_snapshot(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the file would have run it"


def test_every_truncation_is_one_clear_error(tmp_path):
    oracle, _ = recorded([("malloc", 5 * MIB, 0), ("malloc", 700, 1), ("free", 0, 0)])
    data = pickle.dumps(snapshot_of(oracle), protocol=4)
    path = tmp_path / "short.pickle"
    for size in range(0, len(data) - 1, 7):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"ends in the middle|no memory snapshot|opcode|protocol"):
            read_snapshot(path)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_format_error(data):
    with contextlib.suppress(FormatError):
        assert isinstance(plain_unpickle(b"\x80\x04" + data), object)


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_byte_is_a_snapshot_or_a_format_error(tmp_path_factory, data):
    oracle, _ = recorded([("malloc", 5 * MIB, 0), ("malloc", 700, 1), ("free", 0, 0)])
    raw = bytearray(pickle.dumps(snapshot_of(oracle), protocol=4))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pickle"
    path.write_bytes(raw)
    with contextlib.suppress(FormatError):
        (device,) = replay_snapshot(read_snapshot(path))
        assert device.events == len(oracle.history)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=30,
)


@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    again = plain_unpickle(pickle.dumps([value, value, "x" * 70_000], protocol=protocol))
    assert again[:2] == [value, value]
    assert repr(again[0]) == repr(value)


def good() -> dict:
    oracle, _ = recorded([("malloc", 5 * MIB, 0)])
    return snapshot_of(oracle)


def broken(path: str, value: object) -> dict:
    """A good snapshot with one place changed; "…" removes it."""
    raw = copy.deepcopy(good())
    *keys, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: object = raw
    for key in keys:
        place = place[key]  # type: ignore[index]
    if value is ...:
        del place[last]  # type: ignore[attr-defined]
    else:
        place[last] = value  # type: ignore[index]
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("segments", 5, "must be a dict with segments"),
        ("device_traces", [5], "list of events"),
        ("device_traces", [], "no events: call torch.cuda.memory._record_memory_history"),
        ("device_traces.0.0.action", "mmap", "'mmap', which PyTorch's caching allocator does not record"),
        ("device_traces.0.0.addr", -1, r"event 0 \(segment_alloc\) of device 0: addr is -1"),
        ("device_traces.0.0.size", 1.5, "size is 1.5"),
        ("device_traces.0.1.addr", ..., "addr is None"),
        ("device_traces.0.1.pool_id", "default", "two whole numbers"),
        ("segments.0.segment_type", ..., "another allocator backend"),
        ("segments.0.segment_type", "arena", "another allocator backend"),
        ("segments.0.blocks.0.state", "busy", "no state that is known"),
        ("segments.0.total_size", 1, "have 20971520 bytes, it has 1"),
        ("segments.0.blocks.1.address", 7, "not where the one before it ends"),
        (
            "allocator_settings.PYTORCH_CUDA_ALLOC_CONF",
            "backend:cudaMallocAsync",
            "cudaMallocAsync is another allocator",
        ),
        ("allocator_settings.max_split_size", "much", "a number is none"),
        ("allocator_settings.max_split_size", 5, "too small"),
        ("memory_stats", 5, "memory_stats must be a dict"),
        ("segments.0.blocks.0.state", "inactive", "never freed nor there at the end"),
    ],
)
def test_what_is_wrong_with_a_snapshot_is_said_in_one_sentence(folder, path, value, message):
    with pytest.raises(FormatError, match=message):
        replay_snapshot(read(broken(path, value), folder))


# -- the command -------------------------------------------------------------------------------------


def vdnn(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from vdnn.cli.main import command_line\n"
        "try:\n    command_line()\nfinally:\n    assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_the_command_prints_counts_or_the_first_difference(tmp_path):
    path = tmp_path / "s.pickle"
    save_snapshot(good(), path)
    done = vdnn("replay", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 events (1 alloc, 1 segment_alloc)" in done.stdout
    assert "no difference: every event, and at the end 1 segments with 2 blocks" in done.stdout
    row = json.loads(vdnn("replay", str(path), "--json").stdout)[0]
    assert (row["reproduced"], row["difference"]) == (2, None)
    assert row["statistics"]["reserved_bytes.all.peak"] == 20 * MIB

    save_snapshot(broken("segments.0.blocks.0.requested_size", 5), path)
    done = vdnn("replay", str(path))
    assert done.returncode == 1
    assert "first difference at the end, after 2 events as recorded" in done.stdout
    path.write_bytes(b"torn")
    done = vdnn("replay", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vdnn: {path}: ")
    assert io.StringIO(done.stderr).read().count("\n") == 1
